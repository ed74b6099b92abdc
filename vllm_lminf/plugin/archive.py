"""The archive of an engine whose queries recall the middle: its size, its pages, who shares them.

Blocks that leave the window are freed as ever. What recalling needs of them lies in an archive in
host memory, which is one more KV cache group to vLLM, with a pool of its own: block tables, prefix
caching, preemption and aborts come from there. A request holds a page for every block of its
sequence, until it ends.

An archive that is full makes requests wait, and preempts running ones, as a full pool does. It
never refuses one that was admitted, since the longest sequence fits: `plan` sees to it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels.archive import ArchiveFormat
from vllm_lminf.middle import ALL_ROWS, Middle
from vllm_lminf.pattern import LambdaPattern, Pattern, cdiv
from vllm_lminf.plugin.config import LambdaConfig
from vllm_lminf.plugin.host_memory import host_memory
from vllm_lminf.plugin.kv_cache import LambdaSpec

_GIB = 1 << 30

Hasher = Callable[[Request], list[BlockHash]]


@dataclass(frozen=True, kw_only=True)
class ArchiveSpec(FullAttentionSpec):
    """The archive of the layers that recall. vLLM allocates nothing for it: see
    `vllm_lminf.plugin.archive_backend`.

    Attributes:
        num_pages: in the archive of a layer, one of them never used: vLLM's null block.
        index_bits: of an element of its index.
    """

    num_pages: int
    index_bits: int

    @property
    def format(self) -> ArchiveFormat:
        return ArchiveFormat(
            self.num_kv_heads, self.head_size, self.block_size, self.dtype, self.index_bits
        )

    @property
    def page_size_bytes(self) -> int:
        return self.format.page_bytes


class ArchiveManager(FullAttentionManager):
    """The pages of all requests, from a pool of its own. Block ids are those of that pool."""

    kv_cache_spec: ArchiveSpec

    def __init__(self, kv_cache_spec: ArchiveSpec, block_pool: BlockPool, **kwargs: Any) -> None:
        self._device_pool = block_pool
        own_pool = BlockPool(
            num_gpu_blocks=kv_cache_spec.num_pages,
            enable_caching=block_pool.enable_caching,
            hash_block_size=block_pool.hash_block_size,
        )
        super().__init__(kv_cache_spec, block_pool=own_pool, **kwargs)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """None of the device's blocks while there are pages enough, and more of them than there are
        otherwise: vLLM adds up the blocks of all groups, and has the request wait where they exceed
        what is free."""
        pages: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        is_enough = pages <= self.block_pool.get_num_free_blocks()
        return 0 if is_enough else self._device_pool.num_gpu_blocks + 1

    @property
    def num_pages(self) -> int:
        """Pages that requests can hold."""
        return self.kv_cache_spec.num_pages - 1

    @property
    def num_pages_held(self) -> int:
        """Pages that requests hold now, each once however many share it."""
        return self.num_pages - int(self.block_pool.get_num_free_blocks())


def archive_name(layer_name: str) -> str:
    """What a layer's archive is called among vLLM's layers."""
    return f"{layer_name}.archive"


def recalling_layers(resolved: LambdaConfig, patterns: Mapping[str, Pattern]) -> list[str]:
    """The layers that recall: from the setting's first one on, without those that have a window of
    their own.

    Args:
        resolved: the engine's settings.
        patterns: what layers see, by their names.
    """
    middle = resolved.middle
    if middle is None:
        return []
    return [
        name
        for name, pattern in patterns.items()
        if pattern == resolved.pattern and middle.recalls(extract_layer_index(name) + 1)
    ]


@dataclass(frozen=True)
class ArchivePages:
    """How the archive of an engine is cut.

    Attributes:
        page: in the archive of one layer.
        layers: of every worker, those that recall; a page of a request is one in each of them.
    """

    page: ArchiveFormat
    layers: list[list[str]]

    @property
    def bytes_in_all_layers(self) -> int:
        """What a block of a request's tokens takes."""
        return self.page.page_bytes * sum(map(len, self.layers))

    def num_within(self, gib: float) -> int:
        """Pages in an archive of so many GiB, of which vLLM's null block is one."""
        return int(gib * _GIB) // self.bytes_in_all_layers


def pages_of(engine: VllmConfig, configs: Sequence[KVCacheConfig]) -> ArchivePages | None:
    """How the archive is cut; None where nothing recalls.

    Args:
        engine: its settings are resolved.
        configs: of every worker, as vLLM planned them.

    Raises:
        UnsupportedError: no layer recalls, or those that do differ in their keys.
    """
    resolved = LambdaConfig.of(engine)
    if resolved.middle is None:
        return None
    recalling: list[list[str]] = []
    found: dict[ArchiveFormat, list[str]] = {}
    for config in configs:
        layers = _lambda_layers(config)
        patterns = {name: spec.pattern for name, spec in layers.items()}
        recalling.append(recalling_layers(resolved, patterns))
        for name in recalling[-1]:
            spec = layers[name]
            page = ArchiveFormat(
                spec.num_kv_heads,
                spec.head_size,
                spec.block_size,
                spec.dtype,
                resolved.middle_index,
            )
            found.setdefault(page, []).append(name)
    if not found:
        raise UnsupportedError(
            [
                f"middle_top_k is {resolved.middle.top_k}, and no layer recalls: from the layer "
                f"{resolved.middle.from_layer} on, every layer has a window of its own; set "
                "middle_from_layer, or middle_top_k to 0"
            ]
        )
    if len(found) > 1:
        raise UnsupportedError(
            [
                f"middle_top_k is {resolved.middle.top_k}, and layers that recall differ in their "
                f"keys, of which there are (key heads x dimensions): {_listed(found)}; set "
                "middle_from_layer to leave some out, or middle_top_k to 0"
            ]
        )
    return ArchivePages(next(iter(found)), recalling)


def plan(engine: VllmConfig, configs: list[KVCacheConfig]) -> list[KVCacheConfig]:
    """Adds the archive to what vLLM planned; nothing where nothing recalls.

    Args:
        engine: its settings are resolved.
        configs: of every worker.

    Raises:
        UnsupportedError: the archive doesn't hold the longest sequence, or the host hasn't got the
            memory, or no layer recalls, or those that do differ in their keys.
    """
    pages = pages_of(engine, configs)
    if pages is None:
        return configs
    page = pages.page
    num_pages = pages.num_within(LambdaConfig.of(engine).archive_gib)
    page_of_host = page.page_bytes * _most_on_one_host(engine, list(map(len, pages.layers)))
    _check_size(engine, num_pages, pages.bytes_in_all_layers, page_of_host, page.block_size)
    spec = ArchiveSpec(
        block_size=page.block_size,
        num_kv_heads=page.num_kv_heads,
        head_size=page.head_size,
        dtype=page.dtype,
        dcp_sharded=False,
        num_pages=num_pages,
        index_bits=page.index_bits,
    )
    for config, layer_names in zip(configs, pages.layers, strict=True):
        archives = [archive_name(name) for name in layer_names]
        config.kv_cache_groups.append(KVCacheGroupSpec(archives, spec, host_resident=True))
        # vLLM tells by it how many requests there is room for.
        config.hisparse_host_num_blocks = num_pages - 1
    return configs


def _lambda_layers(config: KVCacheConfig) -> dict[str, LambdaSpec]:
    """The caches of a worker's layers as they were planned: where layers of a model have pages of
    different sizes, vLLM gives some of them larger blocks than they asked for."""
    layers: dict[str, KVCacheSpec] = {}
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        of_each = isinstance(spec, UniformTypeKVCacheSpecs)
        layers |= spec.kv_cache_specs if of_each else dict.fromkeys(group.layer_names, spec)
    return {name: each for name, each in layers.items() if isinstance(each, LambdaSpec)}


def _listed(found: Mapping[ArchiveFormat, Sequence[str]]) -> str:
    return ", ".join(
        f"{page.num_kv_heads} x {page.head_size} in {names[0]}" for page, names in found.items()
    )


def _most_on_one_host(engine: VllmConfig, num_layers: list[int]) -> int:
    """The most layers that recall whose workers share a host.

    Args:
        num_layers: of every worker, in the order of their ranks.
    """
    parallel = engine.parallel_config
    if parallel.distributed_executor_backend == "ray":
        return max(num_layers)  # it places workers where it likes
    size: int = parallel.local_world_size
    return max(sum(num_layers[n : n + size]) for n in range(0, len(num_layers), size))


def _check_size(
    engine: VllmConfig, num_pages: int, page_of_all: int, page_of_host: int, block_size: int
) -> None:
    """
    Args:
        num_pages: of every layer.
        page_of_all, page_of_host: bytes that one of them takes in the layers of all workers, and in
            those of a host's.
    """
    resolved, max_model_len = LambdaConfig.of(engine), engine.model_config.max_model_len
    needed = cdiv(max_model_len, block_size) + 1
    reasons = []
    if num_pages < needed:
        held = max(0, num_pages - 1) * block_size
        or_shorter = f", or max_model_len to {held} or less" if held > 0 else ""
        reasons.append(
            f"archive_gib is {resolved.archive_gib:g}, which holds the keys and values of {held} "
            f"tokens, and max_model_len is {max_model_len}: set archive_gib to "
            f"{_rounded_up(needed * page_of_all)} or more{or_shorter}"
        )
    reasons += reasons_against_memory(resolved.archive_gib, num_pages * page_of_host)
    if reasons:
        raise UnsupportedError(reasons)


def reasons_against_memory(archive_gib: float, num_bytes: int) -> list[str]:
    """Why an archive can't have so many bytes on this host; empty where it can.

    Args:
        archive_gib: the setting that they follow from.
    """
    total = host_memory()
    if num_bytes <= total:
        return []
    return [
        f"archive_gib is {archive_gib:g}, {num_bytes / _GIB:.2f} of them on this host, which has "
        f"{total / _GIB:.1f} GiB of memory in all, or whose container is limited to that: set it "
        "lower"
    ]


def _rounded_up(num_bytes: int) -> str:
    return f"{cdiv(num_bytes * 100, _GIB) / 100:g}"


def mark_rows_that_look(
    hasher: Hasher, middle: Middle, pattern: LambdaPattern, hash_block_size: int
) -> Hasher:
    """Hashes of blocks that also say which of their rows looked into the middle.

    The keys and values of a row that looked aren't those of one that didn't, in all layers behind
    the first that recalls. Which rows look follows from the length of a request's prompt, so two
    requests may have the same tokens in a block, and not the same keys. Blocks from the first row
    that looks on are therefore hashed with its position; those before it are shared as ever. A row
    that has no middle behind it counts as one that doesn't look: while all of a conversation is
    inside the window, its next turn finds all of it.

    Args:
        hasher: vLLM's: the hashes of a request's full blocks that have none yet.
        middle: what queries recall.
        pattern: what hides it; the first query that has a middle is at n_global + n_local.
        hash_block_size: tokens that a hash covers.
    """
    if middle.rows == ALL_ROWS:
        return hasher

    first_with_a_middle = pattern.n_global + pattern.n_local

    def hash_blocks(request: Request) -> list[BlockHash]:
        known = len(request.block_hashes)
        first_row = max(middle.first_row(request.num_prompt_tokens), first_with_a_middle)
        unmarked = max(0, first_row // hash_block_size - known)
        hashes = hasher(request)
        mark = first_row.to_bytes(8, "little")
        return hashes[:unmarked] + [
            BlockHash(hashlib.sha256(mark + each).digest()) for each in hashes[unmarked:]
        ]

    return hash_blocks


def first_rows(middle: Middle, prompt_lens: torch.Tensor) -> torch.Tensor:
    """`Middle.first_row` of every request.

    Args:
        prompt_lens: integers [num_requests].

    Returns:
        int32 [num_requests].
    """
    rows = min(middle.rows, torch.iinfo(torch.int32).max)
    return (prompt_lens - rows).clamp_(min=0).to(torch.int32)
