"""Sizes for every launch: tiles, warps, pipeline stages, splits.

They follow from what the host knows without asking the device: the layer, the cache, and bounds on
the batch. A launch is therefore the same whenever a captured CUDA graph is replayed.
"""

from dataclasses import dataclass

import torch

from vllm_lminf.kernels.interface import Heads
from vllm_lminf.pattern import LambdaPattern, cdiv

MAX_DECODE_ROWS = 64
"""Up to so many rows, a request's queries times the query heads of a key head, one tile holds all
of them, and its keys are split among programs."""

_MIN_ROWS = 16
_PROGRAMS_PER_MULTIPROCESSOR = 4
_MIN_TILES_PER_SPLIT = 2


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
    """

    is_amd: bool
    capability: int
    multiprocessors: int


def hardware_of(device: torch.device) -> Hardware:
    """The hardware behind a device; for the CPU, some that splits small batches too."""
    if device.type == "cpu":
        return Hardware(False, 90, 4)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Hardware(True, 0, properties.multi_processor_count)
    capability = 10 * properties.major + properties.minor
    return Hardware(False, capability, properties.multi_processor_count)


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


def _global_keys(pattern: LambdaPattern, most: int) -> int:
    return min(most, max(_MIN_ROWS, power_of_two(max(pattern.n_global, 1))))


def decode_plan(
    heads: Heads, pattern: LambdaPattern, cache_dtype: torch.dtype, hardware: Hardware, rows: int
) -> Plan:
    """For requests whose queries fit into one tile of so many rows."""
    row_bytes = power_of_two(heads.head_size) * cache_dtype.itemsize
    keys = max(16, min(64, 16384 // row_bytes))
    stages = 2 if hardware.is_amd else 3
    group = heads.num_heads // heads.num_kv_heads
    return Plan(rows, rows // group, keys, _global_keys(pattern, keys), 4, stages)


def prefill_plan(
    heads: Heads, pattern: LambdaPattern, cache_dtype: torch.dtype, hardware: Hardware
) -> Plan:
    """For requests of any number of queries."""
    group = heads.num_heads // heads.num_kv_heads
    dims = power_of_two(heads.head_size)
    wide = heads.dtype.itemsize > 2
    rows = max(64 if dims > 128 or wide else 128, power_of_two(group))
    keys = 32 if dims > 128 or wide else 64
    warps = 8 if rows >= 128 else 4
    stages = 2 if hardware.is_amd or wide else 3
    return Plan(rows, rows // group, keys, _global_keys(pattern, keys), warps, stages)


def num_splits(programs: int, pattern: LambdaPattern, plan: Plan, multiprocessors: int) -> int:
    """Among how many programs the keys of a tile are split.

    Enough for every multiprocessor to have some, as long as each has keys to read.

    Args:
        programs: how many there are without a split.
        multiprocessors: of the device.
    """
    tiles = cdiv(pattern.n_local, plan.keys) + cdiv(pattern.n_global, plan.global_keys) + 1
    wanted = cdiv(_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, programs)
    return max(1, min(wanted, tiles // _MIN_TILES_PER_SPLIT))


def most_partial_rows(heads: Heads, multiprocessors: int) -> int:
    """Rows of partial results that a step of one query a request leaves at the most.

    ``programs * num_splits`` is below ``wanted + programs``, and without a split there are none.
    """
    return 2 * _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors * decode_rows(heads, 1)
