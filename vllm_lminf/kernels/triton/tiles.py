"""What a program works on: its rows of queries, and keys and values by their positions."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# ruff: noqa: SIM108  what is known at compile time has a branch of its own

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
def slots_of(
    block_row,
    start,
    keys,
    readable,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Where the keys at positions ``keys`` lie: int64 blocks and int32 places in them.

    Args:
        block_row: the request's row of the block table.
        start: the first of the positions, a multiple of TILE.
        keys: int32 [TILE], consecutive.
        readable: which of them may be looked up; None for all.

    Returns:
        Blocks, one for all keys where a block holds whole tiles, and places [TILE].
    """
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(block_row + start // BLOCK_SIZE)
        place = start % BLOCK_SIZE + tl.arange(0, TILE)
    else:
        entries = block_row + keys // BLOCK_SIZE
        if readable is None:
            block = tl.load(entries)
        else:
            block = tl.load(entries, mask=readable, other=0)
        place = keys % BLOCK_SIZE
    return block.to(tl.int64), place


@triton.jit
def load_rows(
    cache,
    block,
    place,
    dims,
    readable,
    stride_block,
    stride_token,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Keys or values [TILE, DIMS] of one head, as they are stored; 0 where they aren't readable.

    Args:
        cache: the head's share of block 0.
        block, place: see `slots_of`.
        dims: int32 [DIMS], which dimensions.
        readable: bool [TILE], or None for all.
    """
    rows = cache + block * stride_block + place * stride_token
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
