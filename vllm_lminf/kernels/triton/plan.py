"""Sizes for every launch: tiles, warps, pipeline stages, splits.

They follow from what the host knows without asking the device: the layer, the cache, and bounds on
the batch. A launch is therefore the same whenever a captured CUDA graph is replayed.

What a step costs, for heads of ``d`` dimensions, ``w`` keys in the window, elements of ``b`` bytes:

- A decode step reads ``2 * w * d * b`` bytes for every request and key head, 2 MiB for w = 4096,
  d = 128 and bfloat16, and computes ``4 * w * d`` flops for every query head: 4 flops a byte with
  4 query heads to a key head, far below what keeps any GPU busy. Time is bytes over bandwidth, as
  long as enough of them are under way: some 40 KB a multiprocessor on an H200. Hence small tiles
  of rows, several stages of keys, and as many splits as fill the device in whole waves.
- A prefill chunk computes ``4 * w * d`` flops for every query and query head. A tile of 128 rows
  reads 1 byte for 128 flops, from the L2 cache mostly. Two tiles of keys are on their way while
  one is computed on, hence three stages: with two, a copy would begin when its tile is due.
  Shared memory that a device hasn't costs stages first, then keys of a tile.
- A search of the middle reads ``d + 8`` bytes of the index for every key, page by page from the
  host's memory, whose bandwidth (some 60 GB/s over PCIe 5) a few programs fill: 2 ms for 128k
  tokens and 8 key heads of 128. So rows that look share a tile as far as they can.
- The global branch adds ``n_global`` keys to ``w``, and rotates the tile of queries once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_lminf.kernels.base import Heads
from vllm_lminf.pattern import LambdaPattern, cdiv

MAX_DECODE_ROWS = 64
"""Up to so many rows, a request's queries times the query heads of a key head, one tile holds all
of them, and its keys are split among programs."""

MOST_TILE_KEYS = 128
"""No tile has more keys; tiles are powers of two."""

_MIN_ROWS = 16
_MOST_GLOBAL_KEYS = 32
_PROGRAMS_PER_MULTIPROCESSOR = 2
_MOST_WAVES = 16
"""Splits leave no more programs than fill a device so many times."""
_WARP_GROUPS = (90, 100, 103)
"""Capabilities on which Triton multiplies by warp groups, or in memory of its own for products."""
_SCRATCH_BYTES = 4096
"""Shared memory beside tiles: what threads exchange."""
_SPLIT_TILES = 0.5
"""What a split costs beside its tiles, in tiles: its first copies, and handing over its result. A
guess: nothing here was measured on a device."""
_PARTIAL_BYTES = 2**25
"""Room for partial results, at the most."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is ``n`` or more."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Hardware:
    """What sizes depend on.

    Attributes:
        is_amd: whether it is an AMD device.
        capability: of a CUDA device, 90 for 9.0; 0 elsewhere.
        multiprocessors: how many programs run side by side at least.
        shared_memory: bytes of it that a program may have.
    """

    is_amd: bool
    capability: int
    multiprocessors: int
    shared_memory: int


def hardware_of(device: torch.device) -> Hardware:
    """The hardware behind a device; for the CPU, some that splits small batches too."""
    if device.type == "cpu":
        return Hardware(False, 90, 16, 227 * 1024)
    properties: Any = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    if torch.version.hip is not None:
        return Hardware(True, 0, count, properties.shared_memory_per_block)
    capability = 10 * properties.major + properties.minor
    return Hardware(False, capability, count, properties.shared_memory_per_block_optin)


@dataclass(frozen=True)
class Plan:
    """Sizes of a launch.

    Attributes:
        rows: rows of a tile, queries times the query heads of a key head.
        queries: queries of a tile.
        keys: keys of a tile of the window.
        global_keys: keys of a tile of the global branch.
        num_warps, num_stages: Triton's.
    """

    rows: int
    queries: int
    keys: int
    global_keys: int
    num_warps: int
    num_stages: int


def decode_rows(heads: Heads, max_query_len: int) -> int:
    """Rows of a tile that holds all queries of a request, or of one query if that is too many."""
    group = heads.num_heads // heads.num_kv_heads
    rows = power_of_two(group * max_query_len)
    return max(_MIN_ROWS, rows if rows <= MAX_DECODE_ROWS else power_of_two(group))


def _global_keys(pattern: LambdaPattern) -> int:
    """All at once, up to some number: a tile of queries is rotated for every tile of keys."""
    return max(_MIN_ROWS, min(_MOST_GLOBAL_KEYS, power_of_two(pattern.n_global)))


def decode_plan(
    heads: Heads, pattern: LambdaPattern, cache_dtype: torch.dtype, hardware: Hardware, rows: int
) -> Plan:
    """For requests whose queries fit into one tile of so many rows."""
    # A stage holds 16 KiB of keys and as much of values; half of it in fp8, which needs registers.
    row_bytes = power_of_two(heads.head_size) * max(2, cache_dtype.itemsize)
    keys = max(16, min(MOST_TILE_KEYS, 16384 // row_bytes))
    warps = 8 if heads.dtype.itemsize > 2 or rows > 32 else 4
    group = heads.num_heads // heads.num_kv_heads
    stages = 2 if hardware.is_amd else 4
    plan = Plan(rows, rows // group, keys, _global_keys(pattern), warps, stages)
    # Two programs to a multiprocessor, each with 1 KiB of the driver's.
    room = (hardware.shared_memory + 1024) // _PROGRAMS_PER_MULTIPROCESSOR - 1024
    return _fitted(plan, heads, cache_dtype, room, plan.num_stages - 1)


def prefill_plan(
    heads: Heads, pattern: LambdaPattern, cache_dtype: torch.dtype, hardware: Hardware
) -> Plan:
    """For requests of any number of queries."""
    group = heads.num_heads // heads.num_kv_heads
    by_groups = hardware.capability in _WARP_GROUPS
    if heads.dtype.itemsize > 2:
        rows, keys, stages = 32, 32, 2
    elif heads.head_size > 128:
        rows, keys, stages = 64, 32, 3
    else:
        # Elsewhere scores of 64 keys spill.
        rows, keys, stages = 128, 64 if by_groups or hardware.is_amd else 32, 3
    if hardware.is_amd:
        stages = 2
    rows = max(rows, power_of_two(group))
    plan = Plan(rows, rows // group, keys, _global_keys(pattern), 8, stages)
    # Where warp groups multiply, the tile that they read is one more to hold.
    ahead = stages if by_groups else stages - 1
    return _fitted(plan, heads, cache_dtype, hardware.shared_memory, ahead)


def _fitted(plan: Plan, heads: Heads, cache_dtype: torch.dtype, room: int, tiles: int) -> Plan:
    """The plan with as many stages, then as many keys, as leave it within its shared memory.

    Args:
        plan: what is wanted.
        room: bytes.
        tiles: of keys, and of values, that the plan's stages hold.
    """
    dims = power_of_two(heads.head_size)
    room -= plan.rows * dims * heads.dtype.itemsize + _SCRATCH_BYTES
    stages, keys = plan.num_stages, plan.keys
    while 2 * tiles * keys * dims * cache_dtype.itemsize > room and keys > 16:
        if stages > 3:
            stages, tiles = stages - 1, tiles - 1
        else:
            keys //= 2
    return replace(plan, keys=keys, num_stages=stages)


def merge_plan(
    heads: Heads, pattern: LambdaPattern, cache_dtype: torch.dtype, hardware: Hardware
) -> Plan:
    """For the global branch alone, of requests of any number of queries.

    Smaller tiles than for prefill: queries and the window's result are in registers at once.
    """
    plan = prefill_plan(heads, pattern, cache_dtype, hardware)
    group = heads.num_heads // heads.num_kv_heads
    rows = max(min(plan.rows, 64), power_of_two(group))
    return replace(plan, rows=rows, queries=rows // group)


def num_splits(programs: int, tiles: int, slots: int, most: int) -> int:
    """Among how many programs the keys of a tile are split.

    As many programs as have room run at once, and as many again when these are done: what counts is
    how many such waves there are, the last one seldom full, and how long the longest program of one
    takes. Of equal times the fewest splits.

    Args:
        programs: how many there are without a split.
        tiles: of keys, for each of them.
        slots: programs that have room on the device.
        most: splits that there is room for.
    """
    best, best_time = 1, float(cdiv(programs, slots) * tiles)
    for splits in range(2, min(tiles, most) + 1):
        waves = cdiv(programs * splits, slots)
        if waves > _MOST_WAVES:
            break
        time = waves * (cdiv(tiles, splits) + _SPLIT_TILES)
        if time < best_time:
            best, best_time = splits, time
    return best


def slots_of(hardware: Hardware) -> int:
    """How many programs of a decode step run at once."""
    return _PROGRAMS_PER_MULTIPROCESSOR * hardware.multiprocessors


def most_partial_rows(heads: Heads, hardware: Hardware) -> int:
    """Rows of partial results that there is room for."""
    row_bytes = 4 * (power_of_two(heads.head_size) + 1)
    rows = _MOST_WAVES * slots_of(hardware) * decode_rows(heads, 1)
    return min(rows, _PARTIAL_BYTES // row_bytes)


@dataclass(frozen=True)
class Step:
    """What the attention of a batch launches.

    Attributes:
        short: for requests whose queries fit into one tile; None where there is no such launch.
        splits: among how many programs a tile's keys are split in it.
        long: for requests with more queries, or None.
    """

    short: Plan | None
    splits: int
    long: Plan | None

    @property
    def skip(self) -> int:
        """Requests with no more queries are left to the launch of the short ones."""
        return 0 if self.short is None else self.short.queries


def plan_step(
    heads: Heads,
    pattern: LambdaPattern,
    cache_dtype: torch.dtype,
    hardware: Hardware,
    num_requests: int,
    max_query_len: int,
) -> Step:
    """What is launched for a batch, which depends on nothing but these.

    Args:
        num_requests: in the batch, padding included; at least 1.
        max_query_len: no request has more queries; at least 1.
    """
    rows = decode_rows(heads, max_query_len)
    short = decode_plan(heads, pattern, cache_dtype, hardware, rows)
    long = None
    if max_query_len > short.queries:
        long = prefill_plan(heads, pattern, cache_dtype, hardware)
        if num_requests == 1:
            return Step(None, 1, long)
    programs = num_requests * heads.num_kv_heads
    tiles = cdiv(pattern.n_local, short.keys) + cdiv(pattern.n_global, short.global_keys) + 1
    room = most_partial_rows(heads, hardware) // (programs * short.rows)
    return Step(short, num_splits(programs, tiles, slots_of(hardware), room), long)


def steps_of_every_kind(
    heads: Heads,
    pattern: LambdaPattern,
    cache_dtype: torch.dtype,
    hardware: Hardware,
    max_requests: int,
    max_query_len: int,
) -> Iterator[tuple[int, int]]:
    """Steps that together launch every kernel that any step can launch.

    A kernel is compiled for a `Plan`, and for whether keys are split. Everything else that changes
    from step to step, the number of splits among it, is told to it when it is launched.

    Args:
        max_requests: no step has more requests.
        max_query_len: no request has more queries.

    Yields:
        num_requests and max_query_len of a step.
    """
    lengths: dict[tuple[int, bool], int] = {}
    for queries in range(1, min(max_query_len, MAX_DECODE_ROWS + 1) + 1):
        rows = decode_rows(heads, queries)
        group = heads.num_heads // heads.num_kv_heads
        lengths.setdefault((rows, queries > rows // group), queries)
    seen: set[tuple[Plan | None, bool]] = {(None, False)}
    for queries in lengths.values():
        for requests in range(1, max_requests + 1):
            step = plan_step(heads, pattern, cache_dtype, hardware, requests, queries)
            kinds = {(step.short, step.splits > 1), (step.long, False)}
            if not kinds <= seen:
                seen |= kinds
                yield requests, queries


MOST_SEARCH_KEYS = 64
"""No tile of an index has more keys."""

_SEARCH_BYTES = 2**25
"""Room for what a scan keeps."""
_LONG_SEARCH_SPLITS = 4
"""Of a search with many rows, of which a few may look: how many is known on the device alone."""
_MOST_SEARCH_SPLITS = 32


@dataclass(frozen=True)
class SearchPlan:
    """What the search of a batch launches.

    Attributes:
        rows, queries: of a tile, as in `Plan`.
        kept_rows: of a tile, of which there may be queries.
        is_decode: one tile holds all queries of any request.
        tiles: how many there are.
        tiles_at_once: of one launch; there are as many launches as that takes.
        splits: among how many programs a tile's keys are split.
        num_warps, num_stages: Triton's.
    """

    rows: int
    queries: int
    kept_rows: int
    is_decode: bool
    tiles: int
    tiles_at_once: int
    splits: int
    num_warps: int
    num_stages: int


def search_keys(block_size: int) -> int:
    """Keys of a tile of an index: as many as pages divide into."""
    return min(MOST_SEARCH_KEYS, block_size & -block_size)


def search_rows(heads: Heads, hardware: Hardware, max_query_len: int) -> tuple[int, bool]:
    """Rows of a tile of a search, and whether it holds all queries of any request."""
    rows, group = decode_rows(heads, max_query_len), heads.num_heads // heads.num_kv_heads
    # More of them spill, on most devices.
    has_registers = heads.head_size <= (128 if hardware.capability in (80, 90) else 64)
    most = max(power_of_two(group), MAX_DECODE_ROWS if has_registers else 32)
    if rows <= most and rows // group >= max_query_len:
        return rows, True
    return most, False


def search_room(heads: Heads, block_size: int) -> int:
    """Rows, each of one split, that there is room for; one tile of all key heads at the least."""
    row_bytes = 4 + 8 * 2 * search_keys(block_size)
    return max(_SEARCH_BYTES // row_bytes, 2 * MAX_DECODE_ROWS * heads.num_kv_heads)


def plan_search(
    heads: Heads,
    block_size: int,
    hardware: Hardware,
    num_requests: int,
    num_tokens: int,
    max_query_len: int,
    max_pages: int,
) -> SearchPlan:
    """What is launched for a batch, which depends on nothing but these.

    Args:
        block_size: tokens of a page.
        num_requests: in the batch, padding included; at least 1.
        num_tokens: rows of the batch, padding included.
        max_query_len: no request has more queries; at least 1.
        max_pages: no request has more.
    """
    group = heads.num_heads // heads.num_kv_heads
    rows, is_decode = search_rows(heads, hardware, max_query_len)
    queries = rows // group
    tiles = num_requests if is_decode else num_tokens // queries + num_requests
    wanted = cdiv(slots_of(hardware), tiles * heads.num_kv_heads)
    if not is_decode:
        wanted = max(wanted, _LONG_SEARCH_SPLITS)
    kept_rows = min(queries, max_query_len) * group
    room = search_room(heads, block_size) // (heads.num_kv_heads * kept_rows)
    most = min(_MOST_SEARCH_SPLITS, room, max_pages * (block_size // search_keys(block_size)))
    splits = max(1, min(wanted, most))
    # Eight of AMD's warps leave each thread too few registers.
    few_warps = hardware.is_amd or (rows == _MIN_ROWS and heads.head_size <= 128)
    return SearchPlan(
        rows,
        queries,
        kept_rows,
        is_decode,
        tiles,
        min(tiles, room // splits),
        splits,
        num_warps=4 if few_warps else 8,
        num_stages=2 if hardware.is_amd else 4,
    )


def searches_of_every_kind(heads: Heads, hardware: Hardware, max_query_len: int) -> list[int]:
    """Values of max_query_len that together launch every kernel that any search can launch; none
    of them is larger than the one given."""
    kinds: dict[tuple[int, bool], int] = {}
    for queries in range(1, min(max_query_len, MAX_DECODE_ROWS + 1) + 1):
        kinds.setdefault(search_rows(heads, hardware, queries), queries)
    return [*kinds.values()]
