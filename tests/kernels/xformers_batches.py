"""Batches for the xformers path, on whatever device it runs."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.kernels.batches import Batch, Case
from tests.kernels.cases import FAR_CASES, VERY_FAR_CASES
from vllm_lminf.kernels.base import DeviceBatch, PagedCache, ScoreRules
from vllm_lminf.kernels.xformers import XformersKernel
from vllm_lminf.pattern import cdiv

_SMALL: dict[str, Any] = {"heads": (2, 1), "head_size": 16}

CASES = [
    # Kinds of batches: lengths around the edges of blocks, window and prefix; drafts, up to as
    # many as are sequences of their own; one more.
    Case("decode", tuple((n, 1) for n in (0, 9, 10, 16, 47, 48, 49, 57, 58, 300)), **_SMALL),
    Case("drafts", ((50, 3), (47, 5), (2, 8), (0, 1), (300, 4)), **_SMALL),
    Case("prefill", ((0, 9), (0, 70)), **_SMALL),
    Case("chunked", ((32, 16), (40, 25), (200, 9)), **_SMALL),
    Case("mixed", ((120, 1), (0, 9), (55, 9), (0, 1), (300, 2)), **_SMALL),
    # Heads and head sizes.
    Case("mixed", ((120, 1), (60, 9)), heads=(6, 2), head_size=64),
    Case("mixed", ((120, 1), (60, 9)), heads=(4, 4), head_size=32),
    Case("mixed", ((120, 1), (60, 2)), heads=(20, 1), head_size=16),
    Case("mixed", ((120, 1), (60, 9)), heads=(2, 1), head_size=256),
    # Blocks of one tile, of several, of no power of two.
    Case("mixed", ((150, 1), (90, 9)), block_size=32, pattern=(40, 48, 48), **_SMALL),
    Case("mixed", ((150, 2), (90, 12)), block_size=48, pattern=(10, 50, 60), **_SMALL),
    Case("mixed", ((450, 2), (290, 12)), block_size=128, pattern=(10, 200, 220), **_SMALL),
    # Prefixes: none, one token, a whole block, tiles of 32 and 64, more than the window.
    Case("mixed", ((150, 1), (90, 9)), pattern=(0, 48, 48), **_SMALL),
    Case("mixed", ((150, 1), (90, 9)), pattern=(1, 48, 48), **_SMALL),
    Case("mixed", ((150, 1), (70, 20)), pattern=(60, 20, 20), **_SMALL),
    Case("mixed", ((150, 1), (0, 25)), pattern=(500, 20, 20), **_SMALL),
    # Windows: one token, as long as the sequence.
    Case("mixed", ((150, 1), (90, 9), (0, 20)), pattern=(10, 1, 1), **_SMALL),
    Case("mixed", ((150, 1), (90, 61)), pattern=(10, 151, 151), **_SMALL),
    # Limits beyond the window.
    Case("mixed", ((150, 1), (30, 25)), pattern=(10, 37, 38), **_SMALL),
    Case("mixed", ((150, 1), (85, 30)), pattern=(20, 37, 90), **_SMALL),
    Case("mixed", ((150, 1), (30, 20)), pattern=(20, 37, 1000), **_SMALL),
    # Rotations: partial, in pairs of neighbours, with a magnitude, none at all.
    Case("mixed", ((150, 1), (90, 9)), head_size=32, rotary_dim=8, heads=(2, 1)),
    Case("mixed", ((150, 1), (90, 9)), is_neox_style=False, **_SMALL),
    Case("mixed", ((150, 1), (90, 9)), rotary_dim=8, magnitude=1.3, **_SMALL),
    Case("mixed", ((150, 1), (40, 20)), rotary_dim=0, pattern=(10, 37, 90), **_SMALL),
]

FAR = [
    dataclasses.replace(case, block_size=16 * cdiv(case.block_size, 16), head_size=16)
    for case in [*FAR_CASES[:2], *VERY_FAR_CASES[2:]]
]

by_id = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
far_by_id = pytest.mark.parametrize("case", FAR, ids=lambda case: case.id)


def near(case: Case) -> Case:
    """The same not so far out, where the oracle can be asked."""
    requests = tuple((min(computed, 500), new) for computed, new in case.requests)
    return dataclasses.replace(case, requests=requests)


def fill(batch: Batch, cache: PagedCache) -> None:
    """Writes all keys that are seen. Older tokens of the block where a window starts are numbers,
    as they are in a cache that is used: everything else stays as it is."""
    dtype, device = cache.key.dtype, cache.key.device
    for row, (stretch, slots) in enumerate(zip(batch.stretches, batch.slots, strict=True)):
        start = batch.pattern.window_start(stretch.query_positions[0])
        block = batch.block_table[row, start // batch.block_size]
        cache.key[block, :, : start % batch.block_size] = 1e4
        cache.value[block, :, : start % batch.block_size] = 1e4
        block, offset = slots // batch.block_size, slots % batch.block_size
        key = batch._turn(stretch.key, stretch.key_positions)
        cache.key[block, :, offset] = key.to(device, dtype)
        cache.value[block, :, offset] = stretch.value.to(device, dtype)


def make_layer(
    batch: Batch,
    dtype: torch.dtype,
    rules: ScoreRules | None = None,
    operators: Any = None,
    device: str = "cpu",
) -> XformersKernel:
    """xformers for a layer like this batch's."""
    return XformersKernel(batch.layer(dtype, rules, device), operators)


def run(
    batch: Batch,
    dtype: torch.dtype,
    layer: XformersKernel,
    *,
    told: DeviceBatch | None = None,
    cache: PagedCache | None = None,
    device: str = "cpu",
) -> torch.Tensor:
    """The layer's output, on a cache that holds NaN wherever nobody wrote."""
    cache = cache or batch.empty_cache(dtype, device)
    fill(batch, cache)
    query = batch.query(dtype).to(device)
    output = torch.full_like(query, torch.nan)
    layer.attend(query, cache, told or batch.device_batch(device), output)
    return output.cpu()
