"""Merges a finished window attention with the global keys behind the window, and the sinks, by
log-sum-exp (merging of attention states, arXiv 2501.01005)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# ruff: noqa: SIM102  what is known at compile time has a condition of its own

import triton
import triton.language as tl

from vllm_lminf.kernels.triton.attention import global_branch
from vllm_lminf.kernels.triton.softmax import LOG2_E, begin
from vllm_lminf.kernels.triton.tiles import request_of_tile


@triton.jit(
    # What changes from step to step: a kernel is compiled once for all values.
    do_not_specialize=[
        "num_requests", "stride_table", "stride_lse_head",
        "stride_query_token", "stride_query_head", "stride_output_token", "stride_output_head",
    ],
    do_not_specialize_on_alignment=["query_start_loc", "seq_lens", "block_table", "lse"],
)  # fmt: skip
def merge_kernel(
    query, key, value, output, lse,
    query_start_loc, seq_lens, block_table, angles, slopes, sinks, key_scale, value_scale,
    scale, num_requests,
    stride_query_token, stride_query_head, stride_output_token, stride_output_head,
    stride_lse_head, stride_lse_token,
    stride_key_block, stride_key_head, stride_key_token,
    stride_value_block, stride_value_head, stride_value_token, stride_table,
    N_GLOBAL: tl.constexpr, N_LOCAL: tl.constexpr, LIMIT: tl.constexpr,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr,
    HALF: tl.constexpr, IS_NEOX: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_QUERIES: tl.constexpr, TILE_GLOBAL: tl.constexpr,
    IS_DECODE: tl.constexpr,
):  # fmt: skip
    """One tile of rows; grid (tiles, key heads). Arguments as those of `attention_kernel`.

    Args:
        output: the window's result, replaced by the merged one.
        lse: float32 [heads, tokens], the window's log-sum-exp, replaced likewise.
        IS_DECODE: one tile holds all queries of any request.
    """
    # They are multiples of 8, which Triton isn't told of arguments that it doesn't specialise.
    stride_query_token = stride_query_token // 8 * 8
    stride_query_head = stride_query_head // 8 * 8
    stride_output_token = stride_output_token // 8 * 8
    stride_output_head = stride_output_head // 8 * 8
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    if IS_DECODE:
        request, skipped = tile, 0
    else:
        request, skipped = request_of_tile(query_start_loc, num_requests, tile, TILE_QUERIES)
    row_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - row_start
    if skipped >= query_len:
        return
    num_queries = tl.minimum(query_len - skipped, TILE_QUERIES)
    first = tl.load(seq_lens + request) - query_len + skipped
    num_global = tl.minimum(tl.maximum(first + num_queries - N_LOCAL, 0), N_GLOBAL)
    if sinks is None:
        if num_global == 0:
            return

    rows, dims = tl.arange(0, TILE_ROWS), tl.arange(0, DIMS)
    valid = rows // GROUP < num_queries
    position = first + tl.minimum(rows // GROUP, num_queries - 1)
    head = kv_head * GROUP + rows % GROUP
    token = (row_start + skipped + rows // GROUP).to(tl.int64)
    query_row = query + token * stride_query_token + head * stride_query_head
    output_row = output + token * stride_output_token + head * stride_output_head
    lse_place = lse + token * stride_lse_token + head.to(tl.int64) * stride_lse_head
    present = valid[:, None] & (dims < HEAD_SIZE)[None, :]
    q = tl.load(query_row[:, None] + dims[None, :], mask=present, other=0.0)
    row_slopes = None
    if slopes is not None:
        row_slopes = tl.load(slopes + head)
    if key_scale is not None:
        scale *= tl.load(key_scale)

    # The window's keys together are one key, whose score is their log-sum-exp.
    window = tl.load(lse_place, mask=valid, other=0.0) * LOG2_E
    sink, weight = begin(sinks, head, True)
    largest = tl.maximum(window, sink)
    shrink = tl.exp2(window - largest)
    total = shrink + weight * tl.exp2(sink - largest)
    weighted = tl.load(output_row[:, None] + dims[None, :], mask=present, other=0.0)
    weighted = weighted.to(tl.float32) * shrink[:, None]
    if value_scale is not None:
        weighted /= tl.load(value_scale)
    weighted, total, largest = global_branch(
        weighted, total, largest,
        q, query_row, valid, position, num_global,
        0, (num_global + TILE_GLOBAL - 1) // TILE_GLOBAL,
        key + kv_head * stride_key_head, value + kv_head * stride_value_head,
        block_table + tl.cast(request, tl.int64) * stride_table, angles, row_slopes, scale,
        stride_key_block, stride_key_token, stride_value_block, stride_value_token,
        N_GLOBAL, N_LOCAL, LIMIT, HEAD_SIZE, DIMS, HALF, IS_NEOX,
        SOFTCAP, BLOCK_SIZE, TILE_GLOBAL,
    )  # fmt: skip
    result = weighted / total[:, None]
    if value_scale is not None:
        result *= tl.load(value_scale)
    merged = (largest + tl.log2(total)) / LOG2_E
    tl.store(output_row[:, None] + dims[None, :], result.to(output.dtype.element_ty), present)
    tl.store(lse_place, merged, mask=valid)
