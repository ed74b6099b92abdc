"""One layer's middle: how its archive is written, and how it is searched. See `search`.

As in `layer`, nothing waits for the device, and what is launched follows from shapes alone: which
rows look is read by the programs, and those of other rows end at once.
"""

from typing import Any

import torch

from vllm_lminf.kernels.archive import RecallBatch
from vllm_lminf.kernels.base import DeviceBatch, Heads, LayerConfig
from vllm_lminf.kernels.triton.plan import (
    Hardware,
    plan_search,
    power_of_two,
    search_keys,
    search_room,
)
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import MAX_POSITION, cdiv

MOST_RECALLED = 64
"""A query recalls so many keys at the most: they are sorted in registers."""

_INDEX_TILE = 32
"""Keys that are indexed at once, at the most."""


def reasons_against_recalling(layer: LayerConfig, middle: Middle) -> list[str]:
    """Why the Triton kernels don't recall a layer's middle."""
    rules, head_size = layer.rules, layer.heads.head_size
    table = (
        (rules.alibi_slopes is not None, "the Triton kernels recall no middle under ALiBi"),
        (rules.sinks is not None, "the Triton kernels recall no middle beside attention sinks"),
        (
            middle.block_size > 1,
            f"the Triton kernels recall single tokens, not blocks of {middle.block_size}: set "
            "middle_unit to token",
        ),
        (
            middle.top_k > MOST_RECALLED,
            f"the Triton kernels recall up to {MOST_RECALLED} tokens a query: set middle_top_k, "
            f"which is {middle.top_k}, to no more",
        ),
        (
            layer.cache_dtype != layer.heads.dtype,
            f"an archive of {layer.cache_dtype}: the Triton kernels keep {layer.heads.dtype} there",
        ),
        (
            layer.index_bits != 8,
            f"an index of {layer.index_bits} bits: the Triton kernels take one of 8",
        ),
        (
            head_size % 16 != 0,
            f"heads of {head_size} dimensions: the archive takes multiples of 16",
        ),
    )
    return [reason for applies, reason in table if applies]


class SearchWorkspace:
    """Where a scan leaves what it found, and the counts of all searches; one for all layers of an
    engine, which run one after the other.

    Args:
        heads: of the layer.
        block_size: tokens of a page.
        device: of the model.

    Attributes:
        counts: int64 [2], on the device: searches, one for each head of a query that looks; and
            those among them in which some keys had to be searched again.
    """

    def __init__(self, heads: Heads, block_size: int, device: torch.device) -> None:
        rows, kept = search_room(heads, block_size), 2 * search_keys(block_size)
        self.bounds = torch.empty(rows, kept, dtype=torch.float32, device=device)
        self.places = torch.empty(rows, kept, dtype=torch.int32, device=device)
        self.lost = torch.empty(rows, dtype=torch.float32, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    @classmethod
    def of(cls, layer: LayerConfig) -> "SearchWorkspace":
        """That of a layer's engine; made by the first layer that asks."""
        key = "search workspace", layer.heads, layer.block_size, layer.device
        workspace: SearchWorkspace | None = layer.shared.get(key)
        if workspace is None:
            made = cls(layer.heads, layer.block_size, layer.device)
            workspace = layer.shared[key] = made
        return workspace


class Recaller:
    """See the module.

    Args:
        layer: with a middle.
        hardware: behind its device.
    """

    def __init__(self, layer: LayerConfig, hardware: Hardware) -> None:
        from vllm_lminf.kernels.triton.archive import index_kernel, keep_kernel
        from vllm_lminf.kernels.triton.search import recall_kernel, scan_kernel

        middle, heads, pattern, rotation = layer.middle, layer.heads, layer.pattern, layer.rotation
        if middle is None:
            raise ValueError("the layer has no middle to recall")
        self._keep_kernel, self._index_kernel = keep_kernel, index_kernel
        self._scan_kernel, self._recall_kernel = scan_kernel, recall_kernel
        self._workspace = SearchWorkspace.of(layer)
        self._hardware = hardware
        self._middle, self._heads, self._block_size = middle, heads, layer.block_size
        self._page_bytes = layer.archive_format.page_bytes
        self._scale = float(layer.rules.scale)
        self._angles, half, is_neox = None, 0, True
        if rotation is not None:
            tables = rotation.tables.tables
            # A cosine and its sine are one number to the kernels.
            self._angles = tables.view(torch.int64).squeeze(-1)
            half, is_neox = tables.shape[1], rotation.is_neox_style
        self._dims = max(16, power_of_two(heads.head_size))
        self._sizes = {
            "NUM_KV_HEADS": heads.num_kv_heads,
            "HEAD_SIZE": heads.head_size,
            "DIMS": self._dims,
            "BLOCK_SIZE": layer.block_size,
        }
        self._rotation = {"HALF": half, "IS_NEOX": is_neox}
        self._search = {
            "N_GLOBAL": pattern.n_global,
            "N_LOCAL": pattern.n_local,
            "LEAST": min(pattern.n_global + pattern.n_local, MAX_POSITION),
            "GROUP": heads.num_heads // heads.num_kv_heads,
            "TILE_KEYS": search_keys(layer.block_size),
        }
        self._list = {
            "SOFTCAP": layer.rules.softcap,
            "TOP_K": middle.top_k,
            "PLACES": MOST_RECALLED,
        }

    @property
    def counts(self) -> torch.Tensor:
        """See `SearchWorkspace`."""
        return self._workspace.counts

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        archive: torch.Tensor,
        batch: DeviceBatch,
        recall: RecallBatch,
        strides: tuple[int, ...],
    ) -> None:
        """Keeps a step's keys and values, and indexes the pages that they fill; see `Kernel`.

        Args:
            strides: of key's rows and heads, and of value's.
        """
        self._check(archive)
        num_tokens, num_requests = recall.slot_mapping.shape[0], batch.seq_lens.shape[0]
        if num_tokens == 0 or num_requests == 0:
            return
        num_kv_heads = self._heads.num_kv_heads
        tile_heads = min(power_of_two(num_kv_heads), max(1, 2048 // self._dims))
        self._keep_kernel[num_tokens, cdiv(num_kv_heads, tile_heads)](
            key, value, archive, recall.slot_mapping, batch.query_start_loc, batch.seq_lens,
            self._angles, num_requests, *strides, archive.stride(0), TILE_HEADS=tile_heads,
            **self._sizes, **self._rotation,
        )  # fmt: skip
        self._index_kernel[num_tokens, num_kv_heads](
            key, archive, recall.slot_mapping, archive.stride(0), **self._sizes,
            TILE=min(_INDEX_TILE, self._search["TILE_KEYS"]),
        )  # fmt: skip

    def add(
        self,
        query: torch.Tensor,
        archive: torch.Tensor,
        batch: DeviceBatch,
        recall: RecallBatch,
        output: torch.Tensor,
        lse: torch.Tensor,
        strides: tuple[int, ...],
    ) -> None:
        """Adds what queries recall to what they see anyway.

        Args:
            query, archive, batch, recall: as in `Kernel.attend_and_recall`; not of no rows.
            output: what queries see without the middle; replaced.
            lse: float32 [num_tokens, num_heads]: its log-sum-exp, in powers of two.
            strides: of query's rows and heads, and of output's.
        """
        self._check(archive)
        if self._middle.top_k == 0:
            return
        workspace, heads = self._workspace, self._heads
        num_requests = batch.seq_lens.shape[0]
        plan = plan_search(
            heads, self._block_size, self._hardware, num_requests, query.shape[0],
            batch.max_query_len, recall.block_table.shape[1],
        )  # fmt: skip
        found = workspace.bounds, workspace.places, workspace.lost, workspace.counts
        told: tuple[Any, ...] = (
            batch.query_start_loc, batch.seq_lens, recall.first_rows, recall.block_table,
            self._angles,
        )  # fmt: skip
        sizes = {
            **self._sizes, **self._rotation, **self._search, "TILE_QUERIES": plan.queries,
            "IS_DECODE": plan.is_decode,
        }  # fmt: skip
        pages = archive.stride(0), recall.block_table.stride(0)
        for first_tile in range(0, plan.tiles, plan.tiles_at_once):
            tiles = min(plan.tiles_at_once, plan.tiles - first_tile)
            self._scan_kernel[tiles, heads.num_kv_heads, plan.splits](
                query, archive, *found, *told, num_requests, first_tile, plan.kept_rows,
                self._middle.distance, *strides[:2], *pages, **sizes, TILE_ROWS=plan.rows,
                num_warps=plan.num_warps, num_stages=plan.num_stages,
            )  # fmt: skip
            self._recall_kernel[tiles, min(plan.queries, batch.max_query_len), heads.num_heads](
                query, archive, output, lse, *found, *told, self._scale, num_requests, first_tile,
                plan.kept_rows, plan.splits, self._middle.distance, *strides, *pages, **sizes,
                **self._list, num_warps=8 if self._dims > 64 else 4,
            )  # fmt: skip

    def no_pages(self) -> torch.Tensor:
        """An archive for launches that read none of it."""
        device = self._workspace.counts.device
        return torch.empty(1, self._page_bytes, dtype=torch.uint8, device=device)

    def _check(self, archive: torch.Tensor) -> None:
        """
        Raises:
            ValueError: it isn't rows of as many bytes as a page has, aligned as they are.
        """
        stride, size = archive.stride(), archive.shape[1]
        if archive.dtype != torch.uint8 or stride[1] != 1 or size != self._page_bytes:
            raise ValueError(
                f"an archive of {archive.dtype}, pages of {size} bytes, strides {stride}: the "
                f"Triton kernels take bytes in pages of {self._page_bytes}"
            )
        if stride[0] % 16:
            raise ValueError(f"pages {stride[0]} bytes apart: it must be a multiple of 16")
