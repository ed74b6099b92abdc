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

import torch

from vllm_lminf.kernels import flash
from vllm_lminf.kernels.base import (
    DeviceBatch,
    Heads,
    PagedCache,
    Rotation,
    ScoreRules,
    Situation,
)
from vllm_lminf.kernels.flash import Attend, FlashLayer
from vllm_lminf.kernels.triton.layer import TritonLayer, Workspace
from vllm_lminf.kernels.triton.plan import decode_rows
from vllm_lminf.pattern import LambdaPattern


def reasons_against(situation: Situation) -> list[str]:
    """Why the two can't run a layer; empty where they can. What FlashAttention takes, Triton's
    kernels take too, or it is among its reasons."""
    return flash.reasons_against(situation)


class HybridLayer:
    """What a layer does with its cache.

    Args:
        heads: the layer's.
        pattern: its Λ.
        rules: how its products become scores; without ALiBi.
        rotation: the model's RoPE, or None where nothing is rotated.
        workspace: shared with the other layers, see `TritonLayer`.
        attend: FlashAttention.
        num_few: queries of a request that decodes, its drafts included. Batches in which nobody
            has more are for Triton's kernels alone, and may be captured in a CUDA graph.

    Raises:
        ValueError: a rule isn't served.
    """

    def __init__(
        self,
        heads: Heads,
        pattern: LambdaPattern,
        rules: ScoreRules,
        rotation: Rotation | None,
        workspace: Workspace,
        attend: Attend,
        num_few: int = 1,
    ) -> None:
        self._flash = FlashLayer(heads, pattern, rules, rotation, workspace, attend)
        self._triton = TritonLayer(heads, pattern, rules, rotation, workspace)
        self._num_few = num_few
        # What a tile of rows holds of a request, where one request's fit into a tile.
        group = heads.num_heads // heads.num_kv_heads
        self._in_a_tile = decode_rows(heads, num_few) // group

    def lambda_attention(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
    ) -> None:
        """Attention of a batch of requests, prefill and decode mixed freely.

        Args:
            query: rotated by its true position; shape [num_tokens, num_heads, head_size]; rows
                past the last request's are padding.
            cache: the keys and values, those of this step included.
            batch: the batch.
            output: written in place; of query's shape.
        """
        if batch.max_query_len <= self._num_few:
            self._triton.lambda_attention(query, cache, batch, output)
            return
        few, long = self._parts(batch)
        self._flash.lambda_attention(query, cache, long, output)
        if batch.seq_lens.shape[0] > 1 or batch.max_query_len <= self._in_a_tile:
            self._triton.lambda_attention(query, cache, few, output)

    def warm_up(self, cache: PagedCache, max_requests: int, max_query_len: int) -> None:
        """Compiles and loads whatever `lambda_attention` can launch; see `TritonLayer.warm_up`."""
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
