"""Layers for the tests of kernels."""

from typing import Any

import torch

from vllm_lminf.kernels.base import (
    DeviceBatch,
    FlashAttentionProvider,
    Heads,
    LayerConfig,
    PagedCache,
    Rotation,
    ScoreRules,
)
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotarySpec, RotationTables


def make_layer(
    heads: Heads,
    pattern: LambdaPattern,
    rules: ScoreRules | None = None,
    device: torch.device | str = "cpu",
    rotary: RotarySpec | None = None,
    **more: Any,
) -> LayerConfig:
    """A layer whose cache is in its own dtype and in blocks of 16, unless told otherwise."""
    rotation = None
    if rotary is not None:
        rotation = Rotation(RotationTables(rotary.inv_freq).to(device), rotary.is_neox_style)
    return LayerConfig(
        heads=heads,
        pattern=pattern,
        rules=rules or ScoreRules(heads.head_size**-0.5),
        device=torch.device(device),
        **{"cache_dtype": heads.dtype, "block_size": 16, "rotation": rotation, **more},
    )


def provider(attend: Any) -> FlashAttentionProvider:
    """FlashAttention, by a function of the test's."""
    return FlashAttentionProvider(list, lambda head_size: attend)


def int32_batch(
    query_start_loc: list[int],
    seq_lens: list[int],
    block_table: list[list[int]],
    device: torch.device | str = "cpu",
) -> DeviceBatch:
    """A batch on a device."""
    starts, lens, table = (
        torch.tensor(x, dtype=torch.int32, device=device)
        for x in (query_start_loc, seq_lens, block_table)
    )
    return DeviceBatch(starts, lens, table, int(starts.diff().max()))


def joint_cache(kv_cache: torch.Tensor) -> PagedCache:
    """vLLM's cache, as kernels take it."""
    return PagedCache.of(kv_cache, kv_cache.dtype)
