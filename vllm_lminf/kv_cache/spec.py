"""The KV cache of a layer under the Λ, as vLLM's allocator sees it."""

from dataclasses import dataclass
from typing import Self

from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, SlidingWindowSpec

from vllm_lminf.pattern import LambdaPattern


@dataclass(frozen=True, kw_only=True)
class LambdaSpec(SlidingWindowSpec):
    """Blocks behind the window are freed, all but those that hold a global token.

    A subclass of `SlidingWindowSpec` because vLLM takes the admission cap from that class and its
    subclasses only. ``sliding_window`` is the Λ's n_local.

    Attributes:
        n_global: leading tokens whose blocks stay as long as the request.
        distance_limit: part of what the layer computes; the allocator doesn't use it.
        num_lookahead_tokens: slots that a draft model fills beyond the tokens in flight.
    """

    n_global: int
    distance_limit: int
    num_lookahead_tokens: int = 0

    @classmethod
    def of(cls, spec: AttentionSpec, pattern: LambdaPattern, num_lookahead_tokens: int = 0) -> Self:
        """The cache that vLLM planned for a layer, kept by this Λ."""
        return cls(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            max_tp_shards=spec.max_tp_shards,
            page_size_padded=spec.page_size_padded,
            sliding_window=pattern.n_local,
            n_global=pattern.n_global,
            distance_limit=pattern.distance_limit,
            num_lookahead_tokens=num_lookahead_tokens,
        )

    @property
    def pattern(self) -> LambdaPattern:
        return LambdaPattern(self.n_global, self.sliding_window, self.distance_limit)

    @property
    def num_retained_tokens(self) -> int:
        """Tokens below a step's first position that the worker leaves in the block table, where
        0 stands for all of them. From 0.33 on the worker blanks entries below a plain window; it
        must not blank the pinned ones."""
        return 0

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        return self.pattern.max_blocks_held(
            self.block_size,
            max_in_flight_tokens + self.num_lookahead_tokens,
            max_model_len,
            self.extra_retained_tokens,
        )

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, LambdaSpec) and spec.pattern == self.pattern
            for spec in kv_cache_specs.values()
        )
