"""How vLLM plans KV caches: from 0.33 on in a module of its own, and in two steps."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

planning: Any
try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:
    from vllm.v1.core import kv_cache_utils as planning

get_kv_cache_groups = planning.get_kv_cache_groups
unify_hybrid_kv_cache_specs = planning.unify_hybrid_kv_cache_specs


def get_kv_cache_configs(
    config: VllmConfig, specs: list[dict[str, KVCacheSpec]], memory: list[int]
) -> list[KVCacheConfig]:
    """Every worker's pool, from its layers' specs and its free memory."""
    of_all_workers = getattr(planning, "get_global_kv_cache_groups", None)
    groups = () if of_all_workers is None else (of_all_workers(config, specs),)
    pools: list[KVCacheConfig] = planning.get_kv_cache_configs(config, specs, memory, *groups)
    return pools
