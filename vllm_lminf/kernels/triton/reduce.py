"""Joins what several programs computed of one tile's keys, in the order of the keys."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def reduce_kernel(
    partial, partial_lse, output, query_start_loc,
    stride_output_token, stride_output_head,
    NUM_SPLITS: tl.constexpr, SPLITS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_QUERIES: tl.constexpr,
):  # fmt: skip
    """One head of one query; grid (requests, queries of a request at most, heads).

    Args:
        partial: float32 [requests, NUM_KV_HEADS, NUM_SPLITS, TILE_ROWS, DIMS]: attention over a
            split's keys alone.
        partial_lse: float32, without the last dimension: log2 of the sum of its powers, minus
            infinity for a split without keys.
        SPLITS: NUM_SPLITS rounded up to a power of two.
    """
    request, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - row_start
    if row >= query_len:
        return
    if query_len > TILE_QUERIES:
        return
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, DIMS)
    program = (request * NUM_KV_HEADS + head // GROUP) * NUM_SPLITS + splits
    partial_row = program.to(tl.int64) * TILE_ROWS + row * GROUP + head % GROUP
    lse = tl.load(partial_lse + partial_row, mask=splits < NUM_SPLITS, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    has_keys = (lse > float("-inf"))[:, None]
    results = tl.load(
        partial + partial_row[:, None] * DIMS + dims[None, :], mask=has_keys, other=0.0
    )
    joint = tl.sum(results * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    where = (row_start + row).to(tl.int64) * stride_output_token + head * stride_output_head
    tl.store(output + where + dims, joint.to(output.dtype.element_ty), mask=dims < HEAD_SIZE)
