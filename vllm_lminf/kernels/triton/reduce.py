"""Merges the attention states that several programs computed of one tile's keys (split-KV), in the
order of the keys."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from vllm_lminf.kernels.triton.softmax import NOTHING

TOGETHER = tl.constexpr(16)
"""Splits whose results are read together."""


@triton.jit(
    do_not_specialize=[
        "num_splits", "num_rows", "tile_queries", "stride_output_token", "stride_output_head",
    ],
    do_not_specialize_on_alignment=["query_start_loc", "output_lse"],
)  # fmt: skip
def reduce_kernel(
    partial, partial_lse, output, output_lse, query_start_loc,
    stride_output_token, stride_output_head,
    num_splits, num_rows, tile_queries, NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """One head of one query; grid (requests, queries of a request at most, heads).

    Args:
        partial: float32 [requests, NUM_KV_HEADS, num_splits, num_rows, DIMS]: attention over a
            split's keys alone, zero for a split without keys.
        partial_lse: float32, without the last dimension: log2 of the sum of its powers, minus
            infinity for a split without keys.
        output_lse: see `attention_kernel`; None where nobody asks for it.
        num_rows: queries of a request at most, times GROUP.
        tile_queries: requests with more queries are left alone.
    """
    request, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - row_start
    if row >= query_len:
        return
    if query_len > tile_queries:
        return
    dims = tl.arange(0, DIMS)
    program = (request * NUM_KV_HEADS + head // GROUP) * num_splits
    first = program.to(tl.int64) * num_rows + row * GROUP + head % GROUP
    largest = NOTHING
    total = 0.0
    merged = tl.zeros((DIMS,), tl.float32)
    for start in range(0, num_splits, TOGETHER):
        splits = start + tl.arange(0, TOGETHER)
        there = splits < num_splits
        partial_row = first + splits * num_rows
        lse = tl.load(partial_lse + partial_row, mask=there, other=float("-inf"))
        where = partial + partial_row[:, None] * DIMS + dims[None, :]
        results = tl.load(where, mask=there[:, None], other=0.0)
        new_largest = tl.maximum(largest, tl.max(lse, axis=0))
        weights = tl.exp2(lse - new_largest)
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=0)
        merged = merged * shrink + tl.sum(results * weights[:, None], axis=0)
        largest = new_largest
    place = (row_start + row).to(tl.int64) * stride_output_token + head * stride_output_head
    merged = (merged / total).to(output.dtype.element_ty)
    tl.store(output + place + dims, merged, mask=dims < HEAD_SIZE)
    if output_lse is not None:
        place = (row_start + row).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head
        tl.store(output_lse + place, largest + tl.log2(total))
