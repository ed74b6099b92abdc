"""The archive in a worker: one for each layer that recalls, and a step's description of it.

To vLLM an archive is one more layer beside the one that it serves, so that it gets a block table
and a slot mapping of its own. Its memory is the host's, pinned where a GPU reads and writes it.
"""

import mmap
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels.archive import RecallBatch
from vllm_lminf.middle import ALL_ROWS, Middle
from vllm_lminf.plugin import archive, log, pinned
from vllm_lminf.plugin.archive import ArchiveSpec
from vllm_lminf.plugin.config import LambdaConfig
from vllm_lminf.plugin.search_counts import SearchCounts

prompt_lens: ContextVar[torch.Tensor | None] = ContextVar("prompt_lens", default=None)
"""While vLLM's older runner builds a step's metadata: tokens of the prompt of each request;
integers [>= num_requests], on the host. Neither runner tells backends what it knows of them:
`vllm_lminf.plugin.patches` has the newer one tell it in the metadata."""


class Archive(AttentionLayerBase):
    """The archive of one layer.

    Attributes:
        name: among vLLM's layers.
        pages: uint8 [num_pages, page_bytes], see `vllm_lminf.kernels.archive.ArchiveFormat`, as the
            layer's kernel reads and writes them; None until the engine's caches are planned.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pages: torch.Tensor | None = None

    def allocate(self, num_pages: int, page_bytes: int, device: torch.device, gib: float) -> None:
        """Gives it its pages.

        Args:
            device: where the layer's kernel runs.
            gib: the setting that they follow from.

        Raises:
            UnsupportedError: the host's memory can't be had.
        """
        pages = _allocate(num_pages, page_bytes)
        if device.type != "cpu":
            pages = pinned.device_view(pages, self, f"archive_gib is {gib:g}")
        self.pages = pages

    def batch(self) -> RecallBatch:
        """The step's, in a layer's forward pass."""
        metadata: Any = get_forward_context().attn_metadata
        batch: RecallBatch = metadata[self.name]
        return batch

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ArchiveBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """None: vLLM would take its memory from the device. `archive.plan` adds it."""
        return None


class ArchiveBackend(AttentionBackend):
    """What vLLM asks of a layer's backend, for an archive, which attends to nothing."""

    @staticmethod
    def get_name() -> str:
        return "LMINF_ARCHIVE"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("an archive is read by the layer that it serves")

    @staticmethod
    def get_builder_cls() -> type["RecallBatchBuilder"]:
        return RecallBatchBuilder


class RecallBatchBuilder(AttentionMetadataBuilder[Any]):
    """Allocates the archives of a worker, and describes each step."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        resolved = LambdaConfig.of(vllm_config)
        middle = resolved.middle
        if not isinstance(kv_cache_spec, ArchiveSpec) or middle is None:
            raise TypeError(
                f"an archive of kind {kv_cache_spec}, in an engine that recalls {middle}"
            )
        self._middle = middle
        shape = kv_cache_spec.num_pages, kv_cache_spec.page_size_bytes
        size = len(layer_names) * shape[0] * shape[1]
        if reasons := archive.reasons_against_memory(resolved.archive_gib, size):
            raise UnsupportedError(reasons)  # a host that the engine's process isn't on
        for each in get_layers_from_vllm_config(vllm_config, Archive, layer_names).values():
            each.allocate(*shape, device, resolved.archive_gib)
        # A captured graph finds each step's rows where it found those of its capture.
        max_requests = vllm_config.scheduler_config.max_num_seqs
        self._first_rows = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self._search_counts = _search_counts(vllm_config, kv_cache_spec, layer_names)
        log.info(
            vllm_config,
            "the middle is recalled in %d layers, from layer %d on: %s, scored at distance %d, by "
            "%s; the archive holds %d blocks of %d tokens, in %.2f GiB of %shost memory",
            len(layer_names),
            middle.from_layer,
            _units(middle),
            middle.distance,
            _rows(middle),
            kv_cache_spec.num_pages - 1,
            kv_cache_spec.block_size,
            size / (1 << 30),
            "" if device.type == "cpu" else "pinned ",
        )

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """It refers to tensors that stay; what may be captured, the layers' kernels tell."""
        return AttentionCGSupport.ALWAYS

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> RecallBatch:
        common = common_attn_metadata
        lens = prompt_lens.get() if common.rswa_prefix_lens is None else common.rswa_prefix_lens
        if lens is None:
            raise RuntimeError("a step's requests are described without their prompts' lengths")
        SearchCounts.latest_step = self._search_counts
        # Requests that are padding have no rows, and the newer runner tells none of their lengths.
        rows = archive.first_rows(self._middle, lens[: common.num_reqs])
        ours = self._first_rows[: len(rows)]
        if rows.device == ours.device:
            ours.copy_(rows)
        else:
            async_tensor_h2d(rows, out=ours)
        return RecallBatch(
            block_table=common.block_table_tensor[: common.num_reqs],
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
            first_rows=self._first_rows[: common.num_reqs],
        )


def _search_counts(
    engine: VllmConfig, spec: ArchiveSpec, archive_names: list[str]
) -> SearchCounts | None:
    """Those of the layers that archives serve; None where their kernels count none."""
    layers = get_layers_from_vllm_config(engine, Attention)
    found: dict[int, torch.Tensor] = {}
    for name, layer in layers.items():
        if archive.archive_name(name) in archive_names:
            counts = layer.impl.kernel_for(spec.block_size, spec.dtype).search_counts
            if counts is not None:
                found[counts.data_ptr()] = counts
    return SearchCounts(found.values()) if found else None


def _allocate(num_pages: int, page_bytes: int) -> torch.Tensor:
    """Pages that are address space alone until somebody writes to them; uint8 [num_pages,
    page_bytes]. A search reads them in long runs: huge pages of the system's, where it has them,
    spare most of the lookups of addresses."""
    # Of memory that processes share, most systems make no huge pages.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, num_pages * page_bytes, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(num_pages, page_bytes)


def _units(middle: Middle) -> str:
    if middle.block_size == 1:
        return f"the best {middle.top_k} tokens of each query head"
    return f"the best {middle.top_k} blocks of {middle.block_size} tokens of each key head"


def _rows(middle: Middle) -> str:
    if middle.rows == ALL_ROWS:
        return "every query"
    return f"the last {middle.rows} queries of a prompt and all behind it"
