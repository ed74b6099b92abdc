"""Searches the middle, in two launches: which keys may be among a query's best, and which are.

`scan_kernel` goes over the index with tiles of rows, whose keys are split among programs, and keeps
of every split the two highest upper bounds in each lane, a lane being the keys at one place of a
tile; and the highest bound that it let go. No order is made, so it costs a few instructions a key.

`recall_kernel` has a program for each head of a query. It scores in float32 the keys that were kept
and may still be among the best, and knows the result to be certain where no split let go of
anything that could. Otherwise it goes over these splits again, itself: a captured graph has no
more launches, but a program may loop. So the result is always exact, and neither the splits nor
what else is in the batch change it. Three of a query's few best keys must share a lane for that,
which is rare (`Recaller.counts` tells how rare), and costs one split's share of the index.

Then it adds what it found to what the query sees anyway.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from vllm_lminf.kernels.triton.angles import angles_at, angles_of, partners_of
from vllm_lminf.kernels.triton.archive import index_of, keys_of, values_of
from vllm_lminf.kernels.triton.softmax import score
from vllm_lminf.kernels.triton.tiles import request_of_tile

SMALLEST_QUERY = tl.constexpr(2.0**-48)
# A query's largest element as tensor cores get it: the others are far from float16's smallest.
LARGEST_NARROW = tl.constexpr(1024.0)
SMALLEST_BOUND = tl.constexpr(2.0**-100)
# What a length in float32 may lack: see `archive`.
LENGTH_ROUNDING = tl.constexpr(1.0001)
# A place in a list of the best keys that is free.
FREE = tl.constexpr(-(2**63))


@triton.jit
def looking_tile(
    query_start_loc, seq_lens, first_rows, num_requests, tile,
    LEAST: tl.constexpr, TILE_QUERIES: tl.constexpr, IS_DECODE: tl.constexpr,
):  # fmt: skip
    """A tile's queries, and which of them look.

    Args:
        LEAST: the first position that has a middle.

    Returns:
        The request; the row of the first query; how many there are, none or fewer than none where
        there is no such tile; the first one's position; the first position that looks.
    """
    if IS_DECODE:
        request, skipped = tile, 0
    else:
        request, skipped = request_of_tile(query_start_loc, num_requests, tile, TILE_QUERIES)
    row_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - row_start
    num_queries = tl.minimum(query_len - skipped, TILE_QUERIES)
    first = tl.load(seq_lens + request) - query_len + skipped
    least = tl.maximum(tl.load(first_rows + request), LEAST)
    return request, row_start + skipped, num_queries, first, least


@triton.jit
def part_of_middle(
    last, split, num_splits,
    N_GLOBAL: tl.constexpr, N_LOCAL: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """A split's part of the tiles of keys in the middle of the query at ``last``: from, to."""
    begin = N_GLOBAL // TILE_KEYS
    num_tiles = (last - N_LOCAL) // TILE_KEYS + 1 - begin
    share, rest = num_tiles // num_splits, num_tiles % num_splits
    start = begin + split * share + tl.minimum(split, rest)
    return start, start + share + tl.where(split < rest, 1, 0)


@triton.jit(
    do_not_specialize=[
        "num_requests", "first_tile", "num_rows", "distance", "stride_table", "stride_query_token",
        "stride_query_head",
    ],
    do_not_specialize_on_alignment=[
        "query_start_loc", "seq_lens", "first_rows", "page_table", "lost", "bounds", "places",
    ],
)  # fmt: skip
def scan_kernel(
    query, archive, bounds, places, lost, counts,
    query_start_loc, seq_lens, first_rows, page_table, angles,
    num_requests, first_tile, num_rows, distance,
    stride_query_token, stride_query_head, stride_page, stride_table,
    N_GLOBAL: tl.constexpr, N_LOCAL: tl.constexpr, LEAST: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr,
    HALF: tl.constexpr, IS_NEOX: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr,
    IS_DECODE: tl.constexpr,
):  # fmt: skip
    """One tile of rows over one split's part of the index; grid (tiles, key heads, splits).

    Args:
        query: rows of the batch, [tokens, heads, HEAD_SIZE]; strides are multiples of 8.
        bounds: float32 [tiles, NUM_KV_HEADS, splits, num_rows, 2 * TILE_KEYS]: the highest upper
            bounds of every lane, then the second highest; minus infinity for none. Written where
            some row of the tile looks.
        places: int32, the same shape: these keys' positions.
        lost: float32, without the last dimension: the highest bound of the others.
        counts: int64 [2]: its first grows by the searches, one for each head of a query.
        first_rows: int32 [requests], see `RecallBatch`; likewise page_table, its block_table.
        angles: see `angles`; None where nothing is rotated.
        first_tile: of this launch, whose tiles are counted from there.
        num_rows: of a tile that there is room for.
        distance: at which keys are scored.
        TILE_KEYS: divides BLOCK_SIZE.
        IS_DECODE: one tile holds all queries of any request.
    """
    stride_query_token = stride_query_token // 8 * 8
    stride_query_head = stride_query_head // 8 * 8
    kv_head, split, num_splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    request, row_start, num_queries, first, least = looking_tile(
        query_start_loc, seq_lens, first_rows, num_requests, first_tile + tl.program_id(0),
        LEAST, TILE_QUERIES, IS_DECODE,
    )  # fmt: skip
    last = first + num_queries - 1
    if num_queries <= 0 or last < least:
        return
    if kv_head == 0 and split == 0:
        num_looking = tl.minimum(last - least + 1, num_queries) * (GROUP * NUM_KV_HEADS)
        tl.atomic_add(counts, num_looking.to(tl.int64), sem="relaxed")

    rows, dims, lanes = tl.arange(0, TILE_ROWS), tl.arange(0, DIMS), tl.arange(0, TILE_KEYS)
    there = dims < HEAD_SIZE
    queries = rows // GROUP
    position = first + tl.minimum(queries, num_queries - 1)
    looks = (queries < num_queries) & (position >= least)
    stop = tl.where(looks, position - N_LOCAL + 1, 0)
    token = (row_start + queries).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    row = query + token * stride_query_token + head * stride_query_head
    present = looks[:, None] & there[None, :]
    q = tl.load(row[:, None] + dims[None, :], mask=present, other=0.0).to(tl.float32)
    if angles is not None:
        pairs, partners, sign = partners_of(dims, HALF, IS_NEOX)
        other = tl.load(row[:, None] + partners[None, :], mask=present, other=0.0).to(tl.float32)
        cos, sin = angles_of(angles, first, position - first, pairs, HALF)
        to_cos, to_sin = angles_at(angles, distance, pairs, HALF)
        turn_cos = cos * to_cos[None, :] + sin * to_sin[None, :]
        turn_sin = sin * to_cos[None, :] - cos * to_sin[None, :]
        q = q * turn_cos + other * turn_sin * sign[None, :]
    length = tl.sqrt(tl.sum(q * q, axis=1)) * LENGTH_ROUNDING
    largest = tl.max(tl.abs(q), axis=1)
    # Not so for NaN.
    is_known = largest >= SMALLEST_QUERY
    unit = tl.where(is_known, largest, 1.0) / LARGEST_NARROW
    narrow = (q * (1.0 / unit)[:, None]).to(tl.float16)

    best = tl.full((TILE_ROWS, TILE_KEYS), float("-inf"), tl.float32)
    second = best
    others = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    best_place = tl.zeros((TILE_ROWS, TILE_KEYS), tl.int32)
    second_place = best_place
    num_indexed = tl.load(seq_lens + request) // BLOCK_SIZE
    pages = page_table + tl.cast(request, tl.int64) * stride_table
    dtype: tl.constexpr = query.dtype.element_ty
    begin, end = part_of_middle(last, split, num_splits, N_GLOBAL, N_LOCAL, TILE_KEYS)
    page = tl.load(pages + begin * TILE_KEYS // BLOCK_SIZE, mask=begin < end, other=0)
    for tile in range(begin, end):
        # Looked up one tile ahead, so that no load of codes waits for the table.
        following = tl.minimum(tile + 1, end - 1) * TILE_KEYS // BLOCK_SIZE
        next_page = tl.load(pages + following)
        keys = tile * TILE_KEYS + lanes
        place = keys % BLOCK_SIZE
        codes, scales, radii, centres = index_of(
            archive, page, kv_head, stride_page, dtype, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE
        )
        where = codes + place[:, None] * HEAD_SIZE + dims[None, :]
        code = tl.load(where, mask=there[None, :], other=0)
        scale, radius = tl.load(scales + place), tl.load(radii + place)
        centre = tl.load(centres + dims, mask=there, other=0.0)
        products = tl.dot(narrow, tl.trans(code.to(tl.float16)))
        shift = tl.sum(q * centre[None, :], axis=1)
        estimate = products * scale[None, :] * unit[:, None] + shift[:, None]
        bound = estimate + (length[:, None] * radius[None, :] + SMALLEST_BOUND)
        # A page that isn't full has no index: any bytes at all.
        is_bound = (tile * TILE_KEYS // BLOCK_SIZE < num_indexed) & is_known[:, None]
        bound = tl.where(is_bound & (bound == bound), bound, float("inf"))
        is_visible = (keys >= N_GLOBAL)[None, :] & (keys[None, :] < stop[:, None])
        bound = tl.where(is_visible, bound, float("-inf"))

        is_best = bound > best
        next_best = tl.where(is_best, best, bound)
        next_place = tl.where(is_best, best_place, keys[None, :])
        best = tl.where(is_best, bound, best)
        best_place = tl.where(is_best, keys[None, :], best_place)
        is_second = next_best > second
        let_go = tl.where(is_second, second, next_best)
        others = tl.maximum(others, tl.max(let_go, axis=1))
        second = tl.where(is_second, next_best, second)
        second_place = tl.where(is_second, next_place, second_place)
        page = next_page

    program = (tl.program_id(0) * NUM_KV_HEADS + kv_head) * num_splits + split
    list_row = program.to(tl.int64) * num_rows + rows
    in_list = list_row[:, None] * (2 * TILE_KEYS) + lanes[None, :]
    is_row = looks[:, None]
    tl.store(bounds + in_list, best, mask=is_row)
    tl.store(bounds + in_list + TILE_KEYS, second, mask=is_row)
    tl.store(places + in_list, best_place, mask=is_row)
    tl.store(places + in_list + TILE_KEYS, second_place, mask=is_row)
    tl.store(lost + list_row, others, mask=looks)


@triton.jit
def _ranked(scores, keys):
    """Scores and positions as integers of their order: higher scores first, then lower positions.
    Zeros of either sign are equal."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - keys).to(tl.int64)


@triton.jit
def _unranked(ranks):
    """The inverse; minus infinity, and some position, for places that are free."""
    bits = (ranks >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    scores = tl.where(ranks == FREE, float("-inf"), bits.to(tl.float32, bitcast=True))
    return scores, 0x7FFFFFFF - (ranks & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _merged(found, others, PLACES: tl.constexpr):
    """The best of a list and of other keys, all of them different, best first; int64 [PLACES].

    Every key is put where the number of better ones says. That is more comparisons than a sorting
    network's, but they don't wait for one another, and few threads would share the network's.
    """
    places = tl.arange(0, PLACES)
    is_taken, is_other = found != FREE, others != FREE
    is_better = others[None, :] > found[:, None]
    rank = places + tl.sum(is_better.to(tl.int32), axis=1)
    is_behind = (found[:, None] > others[None, :]).to(tl.int32)
    other_rank = tl.sum(is_behind, axis=0)
    other_rank += tl.sum((others[:, None] > others[None, :]).to(tl.int32), axis=0)
    here = (rank[:, None] == places[None, :]) & is_taken[:, None]
    merged = tl.sum(tl.where(here, found[:, None], 0), axis=0)
    here = (other_rank[:, None] == places[None, :]) & is_other[:, None]
    merged += tl.sum(tl.where(here, others[:, None], 0), axis=0)
    count = tl.sum(is_taken.to(tl.int32), axis=0) + tl.sum(is_other.to(tl.int32), axis=0)
    return tl.where(places < count, merged, FREE)


@triton.jit
def consider(
    found, least, bound, keys, query, archive, pages, kv_head, stride_page, dtype,
    TOP_K: tl.constexpr, PLACES: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Scores those of some keys that may be among the best, and enters them in the list.

    Args:
        found: int64 [PLACES], the best keys so far, best first, see `_ranked`.
        least: the score of the last of TOP_K; minus infinity while there are fewer.
        bound: float32 [PLACES], of the keys' scores; minus infinity for none.
        keys: int32 [PLACES], positions.
        query: float32 [DIMS].
        pages: the request's row of the table.

    Returns:
        found and least with these keys.
    """
    places, dims = tl.arange(0, PLACES), tl.arange(0, DIMS)
    may_be = (bound >= least) & (bound > float("-inf"))
    if tl.max(may_be.to(tl.int32), axis=0) > 0:
        _, known = _unranked(found)
        is_taken = found != FREE
        is_known = (keys[:, None] == known[None, :]) & is_taken[None, :]
        is_new = may_be & (tl.max(is_known.to(tl.int32), axis=1) == 0)
        page = tl.load(pages + keys // BLOCK_SIZE, mask=is_new, other=0)
        kept = keys_of(
            archive, page, kv_head, stride_page, dtype, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE
        )
        where = (kept + keys % BLOCK_SIZE * HEAD_SIZE)[:, None] + dims[None, :]
        k = tl.load(where, mask=is_new[:, None] & (dims < HEAD_SIZE)[None, :], other=0.0)
        scores = tl.sum(k.to(tl.float32) * query[None, :], axis=1)
        found = _merged(found, tl.where(is_new, _ranked(scores, keys), FREE), PLACES)
        last = tl.max(tl.where(places == TOP_K - 1, found, FREE), axis=0)
        least, _ = _unranked(last)
    return found, least


@triton.jit(
    do_not_specialize=[
        "num_requests", "first_tile", "num_rows", "num_splits", "distance", "stride_table",
        "stride_query_token", "stride_query_head", "stride_output_token", "stride_output_head",
    ],
    do_not_specialize_on_alignment=[
        "query_start_loc", "seq_lens", "first_rows", "page_table", "lost", "bounds", "places",
        "lse",
    ],
)  # fmt: skip
def recall_kernel(
    query, archive, output, lse, bounds, places, lost, counts,
    query_start_loc, seq_lens, first_rows, page_table, angles,
    scale, num_requests, first_tile, num_rows, num_splits, distance,
    stride_query_token, stride_query_head, stride_output_token, stride_output_head,
    stride_page, stride_table,
    N_GLOBAL: tl.constexpr, N_LOCAL: tl.constexpr, LEAST: tl.constexpr, SOFTCAP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr,
    HALF: tl.constexpr, IS_NEOX: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr, TOP_K: tl.constexpr,
    PLACES: tl.constexpr, IS_DECODE: tl.constexpr,
):  # fmt: skip
    """One head of one query that looks; grid (tiles, queries of a tile, heads). Arguments as those
    of `scan_kernel`, whose results it reads.

    Args:
        output: what the query sees without the middle, replaced by all of it.
        lse: float32 [tokens, heads], contiguous: its log-sum-exp, in powers of two.
        counts: int64 [2]: its second grows by one where a split is searched again.
        TOP_K: keys that are recalled.
        PLACES: in the list of the best; no less than TOP_K and TILE_KEYS, and a power of two.
    """
    stride_query_token = stride_query_token // 8 * 8
    stride_query_head = stride_query_head // 8 * 8
    stride_output_token = stride_output_token // 8 * 8
    stride_output_head = stride_output_head // 8 * 8
    query_in_tile, head = tl.program_id(1), tl.program_id(2)
    request, row_start, num_queries, first, least_position = looking_tile(
        query_start_loc, seq_lens, first_rows, num_requests, first_tile + tl.program_id(0),
        LEAST, TILE_QUERIES, IS_DECODE,
    )  # fmt: skip
    position = first + query_in_tile
    if query_in_tile >= num_queries or position < least_position:
        return
    last = first + num_queries - 1
    stop = position - N_LOCAL + 1
    kv_head = head // GROUP
    token = tl.cast(row_start + query_in_tile, tl.int64)
    dtype: tl.constexpr = query.dtype.element_ty

    dims, ranks = tl.arange(0, DIMS), tl.arange(0, PLACES)
    there = dims < HEAD_SIZE
    row = query + token * stride_query_token + head * stride_query_head
    q = tl.load(row + dims, mask=there, other=0.0).to(tl.float32)
    if angles is not None:
        pairs, partners, sign = partners_of(dims, HALF, IS_NEOX)
        other = tl.load(row + partners, mask=there, other=0.0).to(tl.float32)
        cos, sin = angles_at(angles, position, pairs, HALF)
        to_cos, to_sin = angles_at(angles, distance, pairs, HALF)
        turn_cos = cos * to_cos + sin * to_sin
        turn_sin = sin * to_cos - cos * to_sin
        q = q * turn_cos + other * turn_sin * sign
    length = tl.sqrt(tl.sum(q * q, axis=0)) * LENGTH_ROUNDING
    is_known = tl.max(tl.abs(q), axis=0) >= SMALLEST_QUERY

    pages = page_table + tl.cast(request, tl.int64) * stride_table
    found = tl.full((PLACES,), FREE, tl.int64)
    least = tl.full((), float("-inf"), tl.float32)
    first_list = (tl.program_id(0) * NUM_KV_HEADS + kv_head).to(tl.int64) * num_splits
    row_in_list = query_in_tile * GROUP + head % GROUP
    num_kept = num_splits * (2 * TILE_KEYS)
    for start in range(0, num_kept, PLACES):
        kept = start + ranks
        list_row = (first_list + kept // (2 * TILE_KEYS)) * num_rows + row_in_list
        in_list = list_row * (2 * TILE_KEYS) + kept % (2 * TILE_KEYS)
        bound = tl.load(bounds + in_list, mask=kept < num_kept, other=float("-inf"))
        keys = tl.load(places + in_list, mask=kept < num_kept, other=0)
        found, least = consider(
            found, least, bound, keys, q, archive, pages, kv_head, stride_page, dtype,
            TOP_K, PLACES, NUM_KV_HEADS, HEAD_SIZE, DIMS, BLOCK_SIZE,
        )  # fmt: skip

    num_indexed = tl.load(seq_lens + request) // BLOCK_SIZE
    searched_again = 0
    for split in range(num_splits):
        highest = tl.load(lost + (first_list + split) * num_rows + row_in_list)
        begin, end = part_of_middle(last, split, num_splits, N_GLOBAL, N_LOCAL, TILE_KEYS)
        if highest < least or highest == float("-inf"):
            end = begin
        else:
            searched_again = 1
        for tile in range(begin, end):
            keys = tile * TILE_KEYS + ranks
            in_tile = ranks < TILE_KEYS
            page = tl.load(pages + tile * TILE_KEYS // BLOCK_SIZE)
            codes, scales, radii, centres = index_of(
                archive, page, kv_head, stride_page, dtype, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE
            )
            place = keys % BLOCK_SIZE
            where = codes + place[:, None] * HEAD_SIZE + dims[None, :]
            code = tl.load(where, mask=in_tile[:, None] & there[None, :], other=0)
            key_scale = tl.load(scales + place, mask=in_tile, other=0.0)
            radius = tl.load(radii + place, mask=in_tile, other=0.0)
            centre = tl.load(centres + dims, mask=there, other=0.0)
            products = tl.sum(code.to(tl.float32) * q[None, :], axis=1)
            estimate = products * key_scale + tl.sum(q * centre, axis=0)
            bound = estimate + (length * radius + SMALLEST_BOUND)
            is_bound = (tile * TILE_KEYS // BLOCK_SIZE < num_indexed) & is_known
            bound = tl.where(is_bound & (bound == bound), bound, float("inf"))
            is_visible = in_tile & (keys >= N_GLOBAL) & (keys < stop)
            bound = tl.where(is_visible, bound, float("-inf"))
            found, least = consider(
                found, least, bound, keys, q, archive, pages, kv_head, stride_page, dtype,
                TOP_K, PLACES, NUM_KV_HEADS, HEAD_SIZE, DIMS, BLOCK_SIZE,
            )  # fmt: skip
    if searched_again > 0:
        tl.atomic_add(counts + 1, tl.full((), 1, tl.int64), sem="relaxed")

    products, keys = _unranked(found)
    is_recalled = (ranks < TOP_K) & (found != FREE)
    scores, unit = score(products, None, None, scale, SOFTCAP)
    scores = tl.where(is_recalled, scores * unit, float("-inf"))
    # All that the query sees without these keys is one key, whose score is its log-sum-exp.
    seen = tl.load(lse + token * (NUM_KV_HEADS * GROUP) + head)
    largest = tl.maximum(seen, tl.max(scores, axis=0))
    weights = tl.exp2(scores - largest)
    weight = tl.exp2(seen - largest)
    total = weight + tl.sum(weights, axis=0)
    page = tl.load(pages + keys // BLOCK_SIZE, mask=is_recalled, other=0)
    kept = values_of(
        archive, page, kv_head, stride_page, dtype, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE
    )
    where = (kept + keys % BLOCK_SIZE * HEAD_SIZE)[:, None] + dims[None, :]
    v = tl.load(where, mask=is_recalled[:, None] & there[None, :], other=0.0)
    recalled = tl.sum(v.to(tl.float32) * weights[:, None], axis=0)
    output_row = output + token * stride_output_token + head * stride_output_head + dims
    result = tl.load(output_row, mask=there, other=0.0).to(tl.float32) * weight + recalled
    tl.store(output_row, (result / total).to(output.dtype.element_ty), mask=there)
