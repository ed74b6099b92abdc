"""The backend as vLLM selects it: its name, what it can do, and which cache it asks for."""

from typing import ClassVar

import torch
from vllm.config.cache import CacheDType
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheSpec,
    SlidingWindowSpec,
)

from vllm_lminf.attention.impl import LambdaAttentionImpl
from vllm_lminf.attention.metadata import LambdaMetadataBuilder
from vllm_lminf.attention.patterns import cache_pattern
from vllm_lminf.config import BACKEND_NAME
from vllm_lminf.kv_cache.spec import LambdaSpec
from vllm_lminf.startup import UnsupportedError


class LambdaAttentionBackend(AttentionBackend):
    """LM-Infinite's Λ-shaped attention for decoders."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[LambdaAttentionImpl]:
        return LambdaAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LambdaMetadataBuilder]:
        return LambdaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A block's heads lie one after the other, so that a head's keys are one stretch."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Every layer's cache becomes that of a Λ, one with a window of its own included.

        vLLM puts a `SlidingWindowSpec` into one group with any other window of the same length,
        and would keep no pinned block for a Λ whose n_local is the window of other layers.

        vLLM names neither the layer nor the engine here, so it is the Λ of the model that this
        process built last; the metadata builder, which is told the engine, checks that it was.
        """
        if type(spec) is SlidingWindowSpec:
            own_window = spec.sliding_window
        elif type(spec) is FullAttentionSpec and not spec.non_causal:
            own_window = None
        else:
            raise UnsupportedError([f"a KV cache of kind {spec}: not served"])
        if spec.head_size_v != spec.head_size:
            sizes = f"keys of {spec.head_size} dimensions and values of {spec.head_size_v}"
            raise UnsupportedError([f"{sizes}: not served"])
        engine = LambdaAttentionImpl.built_last.engine
        return LambdaSpec.of(spec, cache_pattern(engine, own_window), engine.num_lookahead_tokens)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True
