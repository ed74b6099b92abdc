"""Λ-attention by two: Triton's kernels for requests of a few queries, FlashAttention for more.

Decoding, with drafts or without, is a few queries a request over a long window: bound by bytes, and
split among programs as `triton` does it, in full CUDA graphs. Prefill is bound by products, where
FlashAttention knows the hardware best (see `flash` for what it costs). Both read one cache in one
memory order. A batch of both kinds is attended by both, each its own requests:

- FlashAttention takes all rows in one call. A request of a few queries is told to it as one that
  has no more tokens than these: one tile of keys, whose result is dropped. What it costs is a
  program a head, not a window.
- The global branch is merged into the others. (FlashAttention begins with no keys, or with one
  score a head: what the branch found before can't be handed to it, which would save the pass.)
- Then Triton's kernels write the rows of the requests of a few queries. These are computed as they
  are in a batch of their own kind, whatever is beside them.

Which requests are which is decided on the device. The host needs to know the longest alone.
"""

from dataclasses import replace
from typing import ClassVar

import torch

from vllm_lminf.kernels.base import Captures, DeviceBatch, LayerConfig, PagedCache
from vllm_lminf.kernels.flash import FlashKernel
from vllm_lminf.kernels.triton.layer import TritonCacheKernel, TritonKernel
from vllm_lminf.kernels.triton.plan import decode_rows


class HybridKernel(TritonCacheKernel):
    """See the module. Batches in which nobody has more than `LayerConfig.decode_len` queries are
    for Triton's kernels alone, and may be captured in a CUDA graph.

    Raises:
        ValueError: as `FlashKernel`.
    """

    captures: ClassVar[Captures] = Captures.DECODE

    @classmethod
    def unsupported_reasons(cls, layer: LayerConfig) -> list[str]:
        """What FlashAttention takes, Triton's kernels take too, or it is among its reasons."""
        return FlashKernel.unsupported_reasons(layer)

    @classmethod
    def unavailable_reasons(cls, layer: LayerConfig) -> list[str]:
        return FlashKernel.unavailable_reasons(layer)

    def __init__(self, layer: LayerConfig) -> None:
        super().__init__(layer)
        self._flash = FlashKernel(layer)
        self._triton = TritonKernel(layer)
        self._num_few = layer.decode_len
        # What a tile of rows holds of a request, where one request's fit into a tile.
        group = layer.heads.num_heads // layer.heads.num_kv_heads
        self._in_a_tile = decode_rows(layer.heads, self._num_few) // group

    def temporary_bytes(self, num_tokens: int, max_requests: int) -> int:
        return self._flash.temporary_bytes(num_tokens, max_requests)

    def attend(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
    ) -> None:
        if batch.max_query_len <= self._num_few:
            self._triton.attend(query, cache, batch, output)
            return
        few, long = self._parts(batch)
        self._flash.attend(query, cache, long, output)
        if batch.seq_lens.shape[0] > 1 or batch.max_query_len <= self._in_a_tile:
            self._triton.attend(query, cache, few, output)

    def warm_up(self, cache: PagedCache, max_requests: int, max_query_len: int) -> None:
        self._triton.warm_up(cache, max_requests, max(self._num_few, self._in_a_tile))
        self._flash.warm_up(cache, max_requests, max_query_len)

    def _parts(self, batch: DeviceBatch) -> tuple[DeviceBatch, DeviceBatch]:
        """The batch for Triton's kernels, which leave alone requests of more queries than it says
        that there are, and for FlashAttention; made once a step for layers that are alike."""
        name = ("hybrid", self._in_a_tile)
        if name not in batch.shared:
            query_lens = batch.query_start_loc.diff()
            seq_lens = batch.seq_lens.where(query_lens > self._in_a_tile, query_lens)
            few = replace(batch, max_query_len=self._in_a_tile, shared={})
            batch.shared[name] = few, replace(batch, seq_lens=seq_lens, shared={})
        parts: tuple[DeviceBatch, DeviceBatch] = batch.shared[name]
        return parts
