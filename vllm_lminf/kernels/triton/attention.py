"""The fused kernel for decode and prefill: one softmax over the global branch and the window.

A program attends with a tile of rows: queries of one request at consecutive positions, for all
query heads of one key head. It walks over tiles of keys, those of the window first, then those of
the global tokens behind it; where a tile's keys are split among programs, each takes its part of
them. Everything about a request is read on the device.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# ruff: noqa: SIM102  what is known at compile time has a condition of its own

import triton
import triton.language as tl

from vllm_lminf.kernels.triton.angles import angles_of, dims_of, inverse_rotation, small_angles_of
from vllm_lminf.kernels.triton.softmax import begin, score, update
from vllm_lminf.kernels.triton.tiles import blocks_of, load_rows, request_of_tile


@triton.jit
def sum_of_products(query, key, query_other, key_other):
    """Products [rows, keys] of queries and keys whose dimensions come in two halves."""
    products = tl.dot(query, tl.trans(key), input_precision="ieee")
    return tl.dot(query_other, tl.trans(key_other), products, input_precision="ieee")


@triton.jit
def global_branch(
    weighted, total, largest,
    query, query_row, valid, position, num_global, first_tile, end_tile,
    key, value, block_row, angles, slopes, scale,
    stride_key_block, stride_key_token, stride_value_block, stride_value_token,
    N_GLOBAL: tl.constexpr, N_LOCAL: tl.constexpr, LIMIT: tl.constexpr,
    HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr, HALF: tl.constexpr, IS_NEOX: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_GLOBAL: tl.constexpr,
):  # fmt: skip
    """Adds the global keys behind the window to a softmax.

    Farther than the limit, a pair is scored as if the key stood at 0 and the query at the limit.
    If the limit is the window, all these pairs may be: at the limit itself both ways are one.

    Args:
        weighted, total, largest: the softmax, see `softmax.update`.
        query: rotated [rows, DIMS].
        query_row: pointers to the rows' queries.
        valid: bool [rows]: which rows there are.
        position: int32 [rows]: where the queries stand, consecutive positions.
        num_global: how many keys the last row sees.
        first_tile, end_tile: which tiles of keys.
        key, value: the head's shares of block 0.
    """
    dims = tl.arange(0, DIMS)
    beyond = tl.maximum(position - LIMIT, 0)
    first_beyond = tl.min(beyond, axis=0)
    # Few tiles: stages for them would take room from those of the window.
    for tile in tl.range(first_tile, end_tile, num_stages=1):
        start = tile * TILE_GLOBAL
        offsets = tl.arange(0, TILE_GLOBAL)
        keys = start + offsets
        readable = keys < num_global
        blocks = blocks_of(block_row, tile, 0, num_global - 1, BLOCK_SIZE, TILE_GLOBAL)
        distance = position[:, None] - keys[None, :]
        if angles is None:
            k = load_rows(
                key, blocks, keys, dims, readable, stride_key_block, stride_key_token,
                BLOCK_SIZE, HEAD_SIZE, DIMS,
            )  # fmt: skip
            products = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision="ieee")
        else:
            # All pairs at once takes the fewest registers. A product takes 16 dimensions and more.
            PAIRS: tl.constexpr = max(16, DIMS // 2)
            IS_WHOLE: tl.constexpr = HALF == PAIRS
            PRESENT: tl.constexpr = HEAD_SIZE if IS_WHOLE else 0
            pairs = tl.arange(0, PAIRS)
            one, other = dims_of(pairs, HALF, IS_NEOX, IS_WHOLE)
            present = valid[:, None] & (one < HEAD_SIZE)[None, :]
            q = tl.load(query_row[:, None] + one[None, :], mask=present, other=0.0)
            present = valid[:, None] & (other < HEAD_SIZE)[None, :]
            q_other = tl.load(query_row[:, None] + other[None, :], mask=present, other=0.0)
            k = load_rows(
                key, blocks, keys, one, readable, stride_key_block, stride_key_token,
                BLOCK_SIZE, HEAD_SIZE, PRESENT,
            )  # fmt: skip
            k_other = load_rows(
                key, blocks, keys, other, readable, stride_key_block, stride_key_token,
                BLOCK_SIZE, HEAD_SIZE, PRESENT,
            )  # fmt: skip
            cos, sin = angles_of(angles, first_beyond, beyond - first_beyond, pairs, HALF)
            at_limit, at_limit_other = inverse_rotation(q, q_other, cos, sin)
            if N_GLOBAL <= 1024:
                cos, sin = small_angles_of(angles, keys, pairs, HALF)
            else:
                cos, sin = angles_of(angles, start, offsets, pairs, HALF)
            at_zero, at_zero_other = inverse_rotation(k, k_other, cos, sin)
            products = sum_of_products(
                at_limit.to(query.dtype), at_zero.to(query.dtype),
                at_limit_other.to(query.dtype), at_zero_other.to(query.dtype),
            )  # fmt: skip
            if LIMIT > N_LOCAL:
                near = sum_of_products(q, k.to(q.dtype), q_other, k_other.to(q.dtype))
                products = tl.where(distance > LIMIT, products, near)
        scores, unit = score(products, tl.minimum(distance, LIMIT), slopes, scale, SOFTCAP)
        visible = (distance >= N_LOCAL) & (keys < N_GLOBAL)[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        v = load_rows(
            value, blocks, keys, dims, readable, stride_value_block, stride_value_token,
            BLOCK_SIZE, HEAD_SIZE, DIMS,
        )  # fmt: skip
        weighted, total, largest = update(weighted, total, largest, scores, unit, v.to(query.dtype))
    return weighted, total, largest


@triton.jit
def window_tile(
    weighted, total, largest,
    query, position, tile, blocks, first, last,
    key, value, slopes, scale,
    stride_key_block, stride_key_token, stride_value_block, stride_value_token,
    N_LOCAL: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """Adds one tile of the window to a softmax.

    Args:
        blocks: the tile's, see `blocks_of`.
        first, last: where the first and the last row's queries stand.
        IS_EDGE: whether some row may not see some key; otherwise all see all.
        Others: see `global_branch`.
    """
    dims = tl.arange(0, DIMS)
    keys = tile * TILE_KEYS + tl.arange(0, TILE_KEYS)
    readable = None
    if IS_EDGE:
        readable = (keys > first - N_LOCAL) & (keys <= last)
    k = load_rows(
        key, blocks, keys, dims, readable, stride_key_block, stride_key_token,
        BLOCK_SIZE, HEAD_SIZE, DIMS,
    )  # fmt: skip
    products = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision="ieee")
    distance = position[:, None] - keys[None, :]
    scores, unit = score(products, distance, slopes, scale, SOFTCAP)
    if IS_EDGE:
        visible = (distance >= 0) & (distance < N_LOCAL)
        scores = tl.where(visible, scores, float("-inf"))
    v = load_rows(
        value, blocks, keys, dims, readable, stride_value_block, stride_value_token,
        BLOCK_SIZE, HEAD_SIZE, DIMS,
    )  # fmt: skip
    return update(weighted, total, largest, scores, unit, v.to(query.dtype))


@triton.jit(
    # What changes from step to step: a kernel is compiled once for all values.
    do_not_specialize=[
        "num_requests", "num_rows", "skip", "stride_table",
        "stride_query_token", "stride_query_head", "stride_output_token", "stride_output_head",
    ],
    do_not_specialize_on_alignment=["query_start_loc", "seq_lens", "block_table", "output_lse"],
)  # fmt: skip
def attention_kernel(
    query, key, value, output, partial, partial_lse, output_lse,
    query_start_loc, seq_lens, block_table, angles, slopes, sinks, key_scale, value_scale,
    scale, num_requests, num_rows, skip,
    stride_query_token, stride_query_head, stride_output_token, stride_output_head,
    stride_key_block, stride_key_head, stride_key_token,
    stride_value_block, stride_value_head, stride_value_token, stride_table,
    N_GLOBAL: tl.constexpr, N_LOCAL: tl.constexpr, LIMIT: tl.constexpr,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr,
    HALF: tl.constexpr, IS_NEOX: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr, TILE_GLOBAL: tl.constexpr,
    IS_DECODE: tl.constexpr,
):  # fmt: skip
    """Λ-attention of one tile of rows; grid (tiles, key heads, splits).

    Args:
        query, output: rows of the batch, [tokens, heads, HEAD_SIZE]; strides are multiples of 8.
        key, value: the cache, see `PagedCache`.
        partial, partial_lse: where splits leave their results, see `reduce`; None without splits.
        output_lse: float32 [tokens, heads], contiguous: gets the log-sum-exp of what is put out, in
            powers of two. None where nobody asks for it, or `reduce` writes it.
        angles: see `angles`; None where nothing is rotated.
        slopes, sinks, key_scale, value_scale: None where there are none.
        num_rows: of a tile that there is room for in `partial`.
        skip: where IS_DECODE isn't, requests with no more queries are left alone.
        HALF, IS_NEOX: of the rotation.
        IS_DECODE: one tile holds all queries of a request, and requests with more queries are
            left alone.
    """
    # Rows move 16 bytes at a time: of an argument the compiler forgets what `multiple_of` says.
    stride_query_token = stride_query_token // 8 * 8
    stride_query_head = stride_query_head // 8 * 8
    stride_output_token = stride_output_token // 8 * 8
    stride_output_head = stride_output_head // 8 * 8
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if IS_DECODE:
        request, skipped = tile, 0
    else:
        request, skipped = request_of_tile(query_start_loc, num_requests, tile, TILE_QUERIES)
    row_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - row_start
    if IS_DECODE:
        if query_len > TILE_QUERIES:
            return
    elif query_len <= skip:
        return
    if skipped >= query_len:
        return
    num_queries = tl.minimum(query_len - skipped, TILE_QUERIES)
    first = tl.load(seq_lens + request) - query_len + skipped
    last = first + num_queries - 1

    rows = tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, DIMS)
    valid = rows // GROUP < num_queries
    position = first + tl.minimum(rows // GROUP, num_queries - 1)
    head = kv_head * GROUP + rows % GROUP
    token = (row_start + skipped + rows // GROUP).to(tl.int64)
    query_row = query + token * stride_query_token + head * stride_query_head
    present = valid[:, None] & (dims < HEAD_SIZE)[None, :]
    q = tl.load(query_row[:, None] + dims[None, :], mask=present, other=0.0)
    row_slopes = None
    if slopes is not None:
        row_slopes = tl.load(slopes + head)
    if key_scale is not None:
        scale *= tl.load(key_scale)

    block_row = block_table + tl.cast(request, tl.int64) * stride_table
    key += kv_head * stride_key_head
    value += kv_head * stride_value_head
    num_global = tl.minimum(tl.maximum(last - N_LOCAL + 1, 0), N_GLOBAL)
    global_tiles = (num_global + TILE_GLOBAL - 1) // TILE_GLOBAL
    window_start = tl.maximum(first - N_LOCAL + 1, 0) // TILE_KEYS
    window_end = last // TILE_KEYS + 1
    first_global, end_global = 0, global_tiles
    if IS_DECODE:
        # This program's part of all tiles; those of the global branch count first.
        num_tiles = global_tiles + window_end - window_start
        share, rest = num_tiles // tl.num_programs(2), num_tiles % tl.num_programs(2)
        begin_at = split * share + tl.minimum(split, rest)
        end_at = begin_at + share + tl.where(split < rest, 1, 0)
        first_global, end_global = begin_at, tl.minimum(end_at, global_tiles)
        window_end = window_start + tl.maximum(end_at - global_tiles, 0)
        window_start += tl.maximum(begin_at - global_tiles, 0)

    weighted = tl.zeros((TILE_ROWS, DIMS), tl.float32)
    largest, total = begin(sinks, head, split == 0)
    if IS_DECODE:
        interior_start, num_interior = window_end, 0
    else:
        # Tiles that every row sees whole need no mask: those from the last row's window on, up to
        # the first row's own position.
        from_last = tl.maximum(last - N_LOCAL + 1, 0)
        interior_start = from_last // TILE_KEYS + (from_last % TILE_KEYS != 0)
        num_interior = tl.maximum((first + 1) // TILE_KEYS - interior_start, 0)
    # Blocks are looked up one tile ahead, so that no load of keys waits for the table.
    low, last_tile = first - N_LOCAL + 1, last // TILE_KEYS
    current = window_start + tl.where(window_start < interior_start, 0, num_interior)
    current = tl.minimum(current, last_tile)
    blocks = blocks_of(block_row, current, low, last, BLOCK_SIZE, TILE_KEYS)
    for edge in range(window_start, window_end - num_interior):
        following = edge + 1 + tl.where(edge + 1 < interior_start, 0, num_interior)
        following = tl.minimum(following, last_tile)
        next_blocks = blocks_of(block_row, following, low, last, BLOCK_SIZE, TILE_KEYS)
        weighted, total, largest = window_tile(
            weighted, total, largest,
            q, position, current, blocks, first, last,
            key, value, row_slopes, scale,
            stride_key_block, stride_key_token, stride_value_block, stride_value_token,
            N_LOCAL, HEAD_SIZE, DIMS, SOFTCAP, BLOCK_SIZE, TILE_KEYS, True,
        )  # fmt: skip
        current, blocks = following, next_blocks
    if not IS_DECODE:
        current = tl.minimum(interior_start, last_tile)
        blocks = blocks_of(block_row, current, low, last, BLOCK_SIZE, TILE_KEYS)
        for inner in range(interior_start, interior_start + num_interior):
            following = tl.minimum(inner + 1, last_tile)
            next_blocks = blocks_of(block_row, following, low, last, BLOCK_SIZE, TILE_KEYS)
            weighted, total, largest = window_tile(
                weighted, total, largest,
                q, position, inner, blocks, first, last,
                key, value, row_slopes, scale,
                stride_key_block, stride_key_token, stride_value_block, stride_value_token,
                N_LOCAL, HEAD_SIZE, DIMS, SOFTCAP, BLOCK_SIZE, TILE_KEYS, False,
            )  # fmt: skip
            blocks = next_blocks

    # Behind the loops above: before them, what it leaves in registers would have every product of
    # Hopper's warp groups wait for the one before (ptxas warns of it, C7515).
    if N_GLOBAL > 0:
        if first_global < end_global:
            weighted, total, largest = global_branch(
                weighted, total, largest,
                q, query_row, valid, position, num_global,
                first_global, end_global,
                key, value, block_row, angles, row_slopes, scale,
                stride_key_block, stride_key_token, stride_value_block, stride_value_token,
                N_GLOBAL, N_LOCAL, LIMIT, HEAD_SIZE, DIMS, HALF, IS_NEOX,
                SOFTCAP, BLOCK_SIZE, TILE_GLOBAL,
            )  # fmt: skip

    # A split's keys may all be hidden from some row.
    has_keys = total > 0
    total = tl.where(has_keys, total, 1.0)
    factor = 1.0 / total
    if value_scale is not None:
        factor *= tl.load(value_scale)
    result = weighted * factor[:, None]
    if partial is None:
        output_row = output + token * stride_output_token + head * stride_output_head
        tl.store(output_row[:, None] + dims[None, :], result.to(output.dtype.element_ty), present)
        if output_lse is not None:
            place = token * (tl.num_programs(1) * GROUP) + head
            tl.store(output_lse + place, largest + tl.log2(total), mask=valid)
    else:
        program = (tile * tl.num_programs(1) + kv_head) * tl.num_programs(2) + split
        partial_row = program.to(tl.int64) * num_rows + rows
        lse = tl.where(has_keys, largest + tl.log2(total), float("-inf"))
        tl.store(partial_lse + partial_row, lse, mask=valid)
        tl.store(partial + partial_row[:, None] * DIMS + dims[None, :], result, mask=valid[:, None])
