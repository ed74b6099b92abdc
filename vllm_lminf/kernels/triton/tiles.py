"""What a program works on: its rows of queries, and keys and values by their positions."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def request_of_tile(query_start_loc, num_requests, tile, TILE_QUERIES: tl.constexpr):
    """The request that a tile belongs to, and the tile's first query within it.

    A request owns the tiles from ``query_start_loc[r] // TILE_QUERIES + r`` on, which are enough
    for its queries wherever they begin. Some tiles own no query.
    """
    low, high = 0, num_requests - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(query_start_loc + middle) // TILE_QUERIES + middle
        low = tl.where(begins <= tile, middle, low)
        high = tl.where(begins <= tile, high, middle - 1)
    begins = tl.load(query_start_loc + low) // TILE_QUERIES + low
    return low, (tile - begins) * TILE_QUERIES


@triton.jit
def request_of_row(query_start_loc, num_requests, row):
    """The request that a row of the batch belongs to; the last one for rows past its end."""
    low, high = 0, num_requests - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(query_start_loc + middle)
        low = tl.where(begins <= row, middle, low)
        high = tl.where(begins <= row, high, middle - 1)
    return low


@triton.jit
def blocks_of(block_row, tile, low, high, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The blocks of a tile's keys: one number where a block holds whole tiles, else int32 [TILE].

    Args:
        block_row: the request's row of the block table.
        tile: which stretch of TILE positions; at least one of them lies in [low, high].
        low, high: entries of positions outside aren't followed.
    """
    if BLOCK_SIZE % TILE == 0:
        return tl.load(block_row + tile * TILE // BLOCK_SIZE)
    else:
        keys = tile * TILE + tl.arange(0, TILE)
        readable = (keys >= low) & (keys <= high)
        return tl.load(block_row + keys // BLOCK_SIZE, mask=readable, other=0)


@triton.jit
def load_rows(
    cache,
    blocks,
    keys,
    dims,
    readable,
    stride_block,
    stride_token,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Keys or values [TILE, DIMS] of one head, as they are stored; 0 where they aren't readable.

    Args:
        cache: the head's share of block 0.
        blocks: see `blocks_of`.
        keys: int32 [TILE], positions.
        dims: int32, which dimensions.
        DIMS: how many; if it is HEAD_SIZE, all of them are there.
        readable: bool [TILE], or None for all.
    """
    rows = cache + blocks.to(tl.int64) * stride_block + keys % BLOCK_SIZE * stride_token
    where = rows[:, None] + dims[None, :]
    if readable is None and HEAD_SIZE == DIMS:
        return tl.load(where)
    elif readable is None:
        return tl.load(where, mask=(dims < HEAD_SIZE)[None, :], other=0.0)
    elif HEAD_SIZE == DIMS:
        return tl.load(where, mask=readable[:, None], other=0.0)
    else:
        mask = readable[:, None] & (dims < HEAD_SIZE)[None, :]
        return tl.load(where, mask=mask, other=0.0)
