"""Writing keys and values: slots, layouts, rounding; and nothing else is written."""

import pytest
import torch

from tests.kernels.layers import make_layer
from vllm_lminf.kernels.base import Heads, PagedCache
from vllm_lminf.kernels.triton.layer import TritonKernel
from vllm_lminf.pattern import LambdaPattern

NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_SIZE = 6, 16, 3, 24
SLOTS = [[21, 4, 95, 8, 0], [21, -1, 4, -1, 90], [], [-1], [17]]


def make_kernel(dtype: torch.dtype) -> TritonKernel:
    heads = Heads(2 * KV_HEADS, KV_HEADS, HEAD_SIZE, dtype)
    return TritonKernel(make_layer(heads, LambdaPattern(2, 8, 8)))


def tokens(dtype: torch.dtype, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of five tokens, in rows of something wider."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 5, KV_HEADS + 4, HEAD_SIZE + 8, generator=generator) * size
    key, value = rows.to(dtype)[:, :, 1 : 1 + KV_HEADS, :HEAD_SIZE]
    return key, value


def empty(dtype: torch.dtype, heads_first: bool, **scales: torch.Tensor) -> PagedCache:
    shape = (NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    if heads_first:
        key, value = (torch.full(shape, torch.nan).to(dtype) for _ in range(2))
    else:
        other = (NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_SIZE)
        key, value = (torch.full(other, torch.nan).to(dtype).transpose(1, 2) for _ in range(2))
    return PagedCache(key, value, **scales)


def assert_written(
    cache: PagedCache, key: torch.Tensor, value: torch.Tensor, slots: list[int]
) -> None:
    for stored, rows in ((cache.key.float(), key.float()), (cache.value.float(), value.float())):
        for token, slot in enumerate(slots):
            if slot >= 0:
                assert torch.equal(stored[slot // 16, :, slot % 16], rows[token])
        written = sum(slot >= 0 for slot in slots)
        assert (~stored.isnan()).sum() == written * KV_HEADS * HEAD_SIZE


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("slots", SLOTS, ids=str)
@pytest.mark.parametrize("slot_dtype", [torch.int64, torch.int32], ids=str)
def test_slots(slots: list[int], heads_first: bool, slot_dtype: torch.dtype) -> None:
    """In any order; tokens without a slot are skipped, and rows past the slots are padding."""
    cache = empty(torch.float16, heads_first)
    key, value = tokens(torch.float16)
    make_kernel(torch.float16).write_cache(key, value, cache, torch.tensor(slots, dtype=slot_dtype))
    assert_written(cache, key, value, slots)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_fp8(dtype: torch.dtype, scaled: bool) -> None:
    """Divided by the scale, rounded to the nearest, and cut off at the largest number."""
    scales = {}
    if scaled:
        scales = {"key_scale": torch.tensor([0.3]), "value_scale": torch.tensor([0.07])}
    cache = empty(dtype, True, **scales)
    most = torch.finfo(dtype).max
    key, value = tokens(torch.bfloat16, size=most / 4)
    assert key.float().abs().max() > (0.3 if scaled else 0.5) * most
    make_kernel(torch.bfloat16).write_cache(key, value, cache, torch.tensor(SLOTS[0]))
    key_scale, value_scale = (0.3, 0.07) if scaled else (1.0, 1.0)
    expected = [
        (x.float() / torch.tensor(scale)).clamp(-most, most).to(dtype)
        for x, scale in ((key, key_scale), (value, value_scale))
    ]
    assert_written(cache, *expected, SLOTS[0])
