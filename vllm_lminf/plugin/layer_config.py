"""What an engine's configuration tells of its layers, in the kernels' terms."""

from typing import TYPE_CHECKING

import torch

from vllm_lminf.kernels.base import FlashAttentionProvider, Heads, LayerConfig, ScoreRules
from vllm_lminf.middle import INDEX_BITS, Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import versions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ANY_BLOCK_SIZE = 16
"""Stands for one that vLLM is still to choose, among those that the kernel takes."""


def cache_dtype_of(word: str, model_dtype: torch.dtype) -> torch.dtype | None:
    """What --kv-cache-dtype says, as a dtype; None for what no kernel of ours reads."""
    from vllm.platforms import current_platform

    if word == "auto":
        return model_dtype
    if word in ("fp8", "fp8_e4m3"):
        dtype: torch.dtype = current_platform.fp8_dtype()  # some AMD devices have another one
        return dtype
    known = {
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "fp8_e5m2": torch.float8_e5m2,
    }
    return known.get(word)


def flash_attention() -> FlashAttentionProvider:
    """vLLM's own."""
    return FlashAttentionProvider(
        versions.reasons_against_flash_attention, versions.flash_attention
    )


def layer_config_of(
    config: "VllmConfig",
    pattern: LambdaPattern,
    middle: Middle | None = None,
    index_bits: int = INDEX_BITS[0],
) -> LayerConfig:
    """The layers of an engine's model, as far as its configuration tells: ALiBi's slopes are
    zeros, and nothing is rotated.

    What it doesn't tell is assumed to suit: each layer looks again, once it is there.

    Args:
        config: the engine's.
        pattern: the layers' Λ.
        middle: what they recall; None for layers that recall nothing.
        index_bits: of an element of their archives' index.
    """
    from vllm.platforms import current_platform

    model, parallel = config.model_config, config.parallel_config
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    heads = Heads(
        model.get_num_attention_heads(parallel),
        model.get_num_kv_heads(parallel),
        model.get_head_size(),
        model.dtype,
    )
    return LayerConfig(
        heads=heads,
        pattern=pattern,
        rules=ScoreRules(
            scale=heads.head_size**-0.5,
            softcap=getattr(model.hf_text_config, "attn_logit_softcapping", None) or None,
            alibi_slopes=torch.zeros(heads.num_heads) if model.uses_alibi else None,
        ),
        cache_dtype=cache_dtype_of(config.cache_config.cache_dtype, model.dtype) or model.dtype,
        block_size=config.cache_config.block_size or ANY_BLOCK_SIZE,
        device=torch.device(config.device_config.device_type),
        capability=None if capability is None else (capability.major, capability.minor),
        decode_len=1 + config.num_speculative_tokens,
        middle=middle,
        index_bits=index_bits,
        flash_attention=flash_attention(),
    )
