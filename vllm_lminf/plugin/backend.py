"""The backend as vLLM selects it: its name, what it can do, and which cache it asks for."""

from typing import ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.config.cache import CacheDType
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheSpec,
    SlidingWindowSpec,
)

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels.base import Heads, Situation
from vllm_lminf.kernels.registry import choose
from vllm_lminf.kernels.triton.plan import MOST_TILE_KEYS
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin.checks import ANY_BLOCK_SIZE, cache_dtype_of, kernel_of
from vllm_lminf.plugin.config import BACKEND_NAME
from vllm_lminf.plugin.impl import LambdaAttentionImpl
from vllm_lminf.plugin.kv_cache import LambdaSpec
from vllm_lminf.plugin.loaded_model import models
from vllm_lminf.plugin.metadata import LambdaMetadataBuilder
from vllm_lminf.plugin.patterns import cache_pattern

_FP8: tuple[CacheDType, ...] = ("fp8", "fp8_e4m3", "fp8_e5m2")


class LambdaAttentionBackend(AttentionBackend):
    """LM-Infinite's Λ-shaped attention for decoders.

    vLLM asks a class what it can do, not an engine's layers. Where that depends on the kernel, it
    is the kernel of the engine whose model is being built, or was built last in this process.
    """

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        "bfloat16",
        *_FP8,
    ]

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
        """Any, where the PyTorch kernel was asked for, or may be chosen for what the compiled one
        doesn't take; the other kernels take multiples of 16."""
        asked = _asked()
        any_size = asked == "reference" or (
            asked == "auto" and not current_platform.is_cuda_alike()
        )
        return [MultipleOf(1 if any_size else 16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """On GPUs, where nobody names one: a block that holds any tile of keys whole, so that a
        tile's block is looked up once and not for every key."""
        if current_platform.is_cuda_alike() and _asked() != "reference":
            return MOST_TILE_KEYS
        preferred: int = super().get_preferred_block_size(default_block_size)
        return preferred

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A block's heads lie one after the other, so that a head's keys are one stretch."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: CacheDType | None) -> bool:
        if kv_cache_dtype in _FP8 and not current_platform.is_cuda_alike():
            return False
        supported: bool = super().supports_kv_cache_dtype(kv_cache_dtype)
        return supported

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: CacheDType | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability | None,
    ) -> str | None:
        """Every reason of every kernel that would have to do, if none can."""
        capability = None
        if current_platform.is_cuda() and device_capability is not None:
            capability = device_capability.major, device_capability.minor
        cache_dtype = cache_dtype_of(kv_cache_dtype or "auto", dtype)
        if cache_dtype is None:
            return None  # said by `supports_kv_cache_dtype`
        situation = Situation(
            device_type=current_platform.device_type,
            capability=capability,
            heads=Heads(1, 1, head_size, dtype),  # each layer looks again, with its own
            pattern=LambdaPattern(1, 1, 1),
            cache_dtype=cache_dtype,
            block_size=block_size or ANY_BLOCK_SIZE,
            has_rotation=True,
            has_sinks=has_sink,
        )
        choice = choose(_asked(), situation)
        return "; ".join(choice.reasons) if choice.kernel is None else None

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

        It is asked once all models of a process are there as they will run (adapters, drafters,
        buffers for communication), before memory is measured: the time to settle how layers turn
        queries and keys.
        """
        engine = LambdaAttentionImpl.built_last.engine
        models.settle(engine)
        if type(spec) is SlidingWindowSpec:
            own_window = spec.sliding_window
        elif type(spec) is FullAttentionSpec and not spec.non_causal:
            own_window = None
        else:
            raise UnsupportedError([f"a KV cache of kind {spec}: not served"])
        if spec.head_size_v != spec.head_size:
            sizes = f"keys of {spec.head_size} dimensions and values of {spec.head_size_v}"
            raise UnsupportedError([f"{sizes}: not served"])
        return LambdaSpec.of(spec, cache_pattern(engine, own_window), engine.num_lookahead_tokens)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True


def _asked() -> str:
    """The setting "kernel" of the engine that this is about."""
    engine = get_current_vllm_config_or_none()
    if engine is None:
        built_last = getattr(LambdaAttentionImpl, "built_last", None)
        engine = None if built_last is None else built_last.engine
    return "auto" if engine is None else kernel_of(engine)
