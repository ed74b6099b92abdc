"""Batches for the FlashAttention path, on whatever device it runs."""

from typing import Any

import pytest
import torch

from tests.kernels.batches import Batch, Case
from tests.kernels.layers import provider
from tests.kernels.xformers_batches import fill
from vllm_lminf.kernels.base import DeviceBatch, ScoreRules
from vllm_lminf.kernels.flash import FlashKernel
from vllm_lminf.kernels.hybrid import HybridKernel

CASES = [
    Case("prefill", ((0, 9), (0, 70)), heads=(6, 2), head_size=16),
    Case("chunked", ((32, 16), (40, 30), (200, 9))),
    Case("mixed", ((120, 1), (0, 9), (64, 9), (300, 2)), heads=(2, 2), head_size=16),
    Case("mixed", ((290, 12),), block_size=128, pattern=(10, 200, 220), heads=(2, 1)),
    Case("mixed", ((150, 1), (90, 12)), pattern=(0, 48, 48), heads=(2, 1)),
    Case("mixed", ((150, 1), (90, 12), (0, 30)), pattern=(60, 20, 20), heads=(2, 1)),
    Case("mixed", ((150, 1), (90, 12), (85, 30)), pattern=(20, 37, 90), heads=(2, 1)),
    Case("mixed", ((150, 1), (90, 12)), head_size=80, rotary_dim=32, heads=(2, 1)),
    Case("mixed", ((150, 1), (90, 12)), is_neox_style=False, heads=(2, 1)),
    Case("mixed", ((150, 1), (40, 30)), rotary_dim=0, pattern=(10, 37, 90), heads=(2, 1)),
    # Windows that begin in the middle of a tile and of a block, many blocks behind the prefix.
    Case("mixed", ((999, 1), (700, 33), (420, 5)), pattern=(10, 190, 190), heads=(2, 1)),
    Case("mixed", ((999, 1), (700, 33)), pattern=(0, 77, 77), heads=(2, 1), block_size=32),
]

by_id = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def run(
    batch: Batch,
    dtype: torch.dtype,
    attend: Any,
    rules: ScoreRules | None = None,
    *,
    kernel: type[FlashKernel | HybridKernel] = FlashKernel,
    decode_len: int = 1,
    told: DeviceBatch | None = None,
    device: str = "cpu",
) -> torch.Tensor:
    """The output, on a cache that holds NaN wherever nobody wrote, but for older tokens of the
    block where a window starts, which are numbers, as in a cache that is used."""
    more = {"flash_attention": provider(attend), "decode_len": decode_len}
    layer = kernel(batch.layer(dtype, rules, device, **more))
    cache = batch.empty_cache(dtype, device)
    fill(batch, cache)
    query = batch.query(dtype).to(device)
    output = torch.full_like(query, torch.nan)
    layer.attend(query, cache, told or batch.device_batch(device), output)
    return output.cpu()
