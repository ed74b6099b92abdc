"""The Λ's KV cache as vLLM sizes, groups and registers it."""

import pickle
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tests.plugin.kv_cache.planning import (
    get_kv_cache_configs,
    get_kv_cache_groups,
    unify_hybrid_kv_cache_specs,
)
from tests.plugin.kv_cache.simulation import Simulation, make_spec
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin.kv_cache import LambdaManager, LambdaSpec

PATTERN = LambdaPattern(n_global=10, n_local=48, distance_limit=64)


@pytest.fixture
def full() -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=16,
        num_kv_heads=3,
        head_size=64,
        head_size_v=32,
        dtype=torch.bfloat16,
        max_tp_shards=3,
        page_size_padded=2**15,
    )


def layers(spec: KVCacheSpec) -> dict[str, KVCacheSpec]:
    return {f"model.layers.{layer}.self_attn.attn": spec for layer in range(4)}


def test_of_a_full_attention_layer(full: FullAttentionSpec) -> None:
    spec = LambdaSpec.of(full, PATTERN)
    for name in (
        "block_size",
        "num_kv_heads",
        "head_size",
        "head_size_v",
        "dtype",
        "kv_quant_mode",
        "max_tp_shards",
        "page_size_padded",
        "page_size_bytes",
        "real_page_size_bytes",
    ):
        assert getattr(spec, name) == getattr(full, name), name
    assert spec.pattern == PATTERN
    assert spec.sliding_window == 48


def test_is_a_sliding_window_for_vllm(full: FullAttentionSpec) -> None:
    """It takes the admission cap from this class and its subclasses only."""
    assert isinstance(LambdaSpec.of(full, PATTERN), SlidingWindowSpec)


@pytest.mark.parametrize("in_flight", [1, 16, 100, 2048])
@pytest.mark.parametrize("length", [5, 100, 1_000_000])
@pytest.mark.parametrize("retained", [0, 3])
def test_cap_is_the_bound_of_the_pattern(in_flight: int, length: int, retained: int) -> None:
    spec = make_spec(10, 48, 16, extra_retained_tokens=retained)
    assert spec.max_admission_blocks_per_request(in_flight, length) == (
        spec.pattern.max_blocks_held(16, in_flight, length, retained)
    )


@pytest.mark.parametrize("first_chunk", range(1, 32))
def test_cap_has_room_for_the_slots_of_a_draft_model(first_chunk: int) -> None:
    """However its steps lie on blocks, a request of many caps runs in a pool of one."""
    num_lookahead, in_flight = 20, 32
    spec = replace(make_spec(10, 64, 16), num_lookahead_tokens=num_lookahead)
    cap = spec.max_admission_blocks_per_request(in_flight, 10**6)
    simulation = Simulation(spec, cap, in_flight, enable_caching=False)
    request = simulation.request(list(range(1000)))
    chunk = first_chunk
    while request.num_computed_tokens < request.num_tokens:
        chunk = min(chunk, request.num_tokens - request.num_computed_tokens)
        assert simulation.kv.allocate_slots(request, chunk, num_lookahead_tokens=num_lookahead)
        request.num_computed_tokens += chunk
        # vLLM keeps one token of a step's budget for the draft model.
        chunk = in_flight - 1


def test_worker_keeps_the_whole_block_table() -> None:
    assert make_spec(10, 48, 16).num_retained_tokens == 0


def test_same_in_another_process(full: FullAttentionSpec) -> None:
    spec = LambdaSpec.of(full, PATTERN)
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.pattern == PATTERN


def test_survives_another_block_size(full: FullAttentionSpec) -> None:
    spec = LambdaSpec.of(replace(full, page_size_padded=None), PATTERN)
    other = spec.copy_with_new_block_size(32)
    assert type(other) is LambdaSpec
    assert other.pattern == PATTERN
    assert other.page_size_bytes == 2 * spec.page_size_bytes


class TestRegistry:
    def test_finds_the_manager(self) -> None:
        spec = make_spec(10, 48, 16)
        assert KVCacheSpecRegistry.get_manager_class(spec) is LambdaManager
        assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec) is LambdaSpec

    def test_still_knows_those_of_vllm(self, full: FullAttentionSpec) -> None:
        assert KVCacheSpecRegistry.get_manager_class(full) is FullAttentionManager
        sliding = SlidingWindowSpec(
            block_size=16, num_kv_heads=3, head_size=64, dtype=torch.bfloat16, sliding_window=48
        )
        assert KVCacheSpecRegistry.get_manager_class(sliding) is SlidingWindowManager


class TestGroups:
    @pytest.mark.parametrize("changed", ["n_global", "n_local", "distance_limit"])
    def test_layers_with_another_pattern_are_not_uniform(self, changed: str) -> None:
        spec = make_spec(10, 48, 16)
        values = {"n_global": 11, "n_local": 47, "distance_limit": 64}
        pattern = replace(spec.pattern, **{changed: values[changed]})
        other = replace(spec, pattern=pattern, sliding_window=pattern.n_local)
        assert spec.is_uniform_with_collection({"a": spec, "b": spec})
        assert not spec.is_uniform_with_collection({"a": spec, "b": other})
        assert not UniformTypeKVCacheSpecs.is_uniform_type({"a": spec, "b": other})
        with pytest.raises(AssertionError):
            LambdaSpec.merge([spec, other])

    def test_a_plain_window_is_not_uniform_with_it(self) -> None:
        spec = make_spec(10, 48, 16)
        plain = SlidingWindowSpec(
            block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=48
        )
        assert not spec.is_uniform_with_collection({"a": spec, "b": plain})

    @pytest.mark.parametrize("first", ["window", "full"])
    def test_a_window_of_the_same_length_is_another_group(
        self, full: FullAttentionSpec, stock_config: VllmConfig, first: str
    ) -> None:
        """One that keeps no global token, whichever layer comes first: what is freed in one group
        is lost to all its layers."""
        config = deepcopy(stock_config)
        config.cache_config.kv_cache_layout = "LBHNC"
        specs = {
            "full": LambdaSpec.of(full, PATTERN),
            "window": LambdaSpec.of(full, LambdaPattern(0, PATTERN.n_local, PATTERN.n_local)),
        }
        order = sorted(specs, key=lambda name: name != first)
        groups = get_kv_cache_groups(config, {name: specs[name] for name in order})
        assert [group.layer_names for group in groups] == [[name] for name in order]
        assert [group.kv_cache_spec for group in groups] == [specs[name] for name in order]

    def test_a_model_is_one_group(self, full: FullAttentionSpec, stock_config: VllmConfig) -> None:
        spec = LambdaSpec.of(full, PATTERN)
        (group,) = get_kv_cache_groups(stock_config, layers(spec))
        assert len(group.layer_names) == 4
        assert group.kv_cache_spec == spec

    def test_windows_survive_without_the_hybrid_manager(self, full: FullAttentionSpec) -> None:
        """vLLM turns a window into full attention where it is asked to keep one kind of cache; a
        model under the Λ has one kind already."""
        spec = LambdaSpec.of(full, PATTERN)
        specs = layers(spec)
        unify_hybrid_kv_cache_specs(specs)
        assert specs == layers(spec)


class TestPool:
    """vLLM sizes the pool, and checks at start-up that a request of max_model_len fits."""

    @pytest.fixture
    def config(self, stock_config: VllmConfig) -> VllmConfig:
        config = deepcopy(stock_config)
        # In an engine this is read from the backend once it is loaded.
        config.cache_config.kv_cache_layout = "LBHNC"
        return config

    @pytest.fixture
    def spec(self, full: FullAttentionSpec) -> LambdaSpec:
        return LambdaSpec.of(full, PATTERN)

    @pytest.fixture
    def cap(self, spec: LambdaSpec, config: VllmConfig) -> int:
        cap = spec.max_admission_blocks_per_request(
            config.max_in_flight_tokens, config.model_config.max_model_len
        )
        assert cap < config.model_config.max_model_len // spec.block_size
        return cap

    def test_a_request_takes_its_cap(self, spec: LambdaSpec, config: VllmConfig, cap: int) -> None:
        assert spec.max_memory_usage_bytes(config) == cap * spec.page_size_bytes

    def test_the_cap_and_the_null_block_are_enough(
        self, spec: LambdaSpec, config: VllmConfig, cap: int
    ) -> None:
        memory = 4 * (cap + 1) * spec.page_size_bytes
        (pool,) = get_kv_cache_configs(config, [layers(spec)], [memory])
        assert pool.num_blocks == cap + 1

    def test_less_is_refused(self, spec: LambdaSpec, config: VllmConfig, cap: int) -> None:
        memory = 4 * cap * spec.page_size_bytes
        with pytest.raises(ValueError, match="KV cache is needed"):
            get_kv_cache_configs(config, [layers(spec)], [memory])
