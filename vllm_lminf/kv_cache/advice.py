"""What to change where the memory for the KV cache is too small for one request."""

from collections.abc import Sequence
from dataclasses import replace

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_lminf.config import BACKEND_NAME
from vllm_lminf.kv_cache.spec import LambdaSpec
from vllm_lminf.startup import pattern_of

Specs = dict[str, KVCacheSpec]


def advice(config: VllmConfig, specs: Sequence[Specs], available_memory: Sequence[int]) -> str:
    """A sentence or two: what a request takes under the Λ, and which n_local would fit.

    Args:
        config: the engine's.
        specs: of every worker, the caches of its layers.
        available_memory: of every worker, in bytes.
    """
    n_local = pattern_of(config).n_local
    fits = _largest_n_local(config, specs, available_memory)
    smaller = (
        f"n_local {fits} fits"
        if fits
        else "no n_local fits with this n_global and this many tokens in flight"
    )
    return (
        f"With {BACKEND_NAME} a request takes no more memory the longer it gets, so a smaller "
        "max_model_len hardly helps. What a request holds follows from n_local, which is "
        f"{n_local}, n_global, and --max-num-batched-tokens, which is "
        f"{config.scheduler_config.max_num_batched_tokens}: {smaller}."
    )


def _largest_n_local(
    config: VllmConfig, specs: Sequence[Specs], available_memory: Sequence[int]
) -> int:
    """The largest window, in steps of 16 tokens, with which one request fits; 0 if there is none.

    A layer with a window of its own keeps it. One block is left to vLLM, which puts it aside.
    """
    n_local = pattern_of(config).n_local

    def fits(window: int) -> bool:
        for layers, memory in zip(specs, available_memory, strict=True):
            needed = 0
            for spec in layers.values():
                cut = spec
                if isinstance(spec, LambdaSpec) and spec.pattern.n_local == n_local:
                    pattern = replace(spec.pattern, n_local=window)
                    cut = LambdaSpec.of(spec, pattern, spec.num_lookahead_tokens)
                needed += cut.max_memory_usage_bytes(config) + cut.page_size_bytes
            if needed > memory:
                return False
        return True

    low, high = 0, n_local // 16
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(16 * middle) else (low, middle - 1)
    return 16 * low
