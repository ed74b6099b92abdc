"""Models with layers that have a window of their own beside layers under the Λ, in one KV cache."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.v1.worker.gpu import attn_utils as second_runner

from tests.engine.conftest import Engine, block_pool, kv_cache_manager
from tests.engine.families import FAMILIES, NATIVE_WINDOW, TRAINED_LENGTH, Family, OracleModel
from tests.engine.test_exactness import TOLERANCE, engine_logprobs, random_prompts
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin.kv_cache import LambdaManager, LambdaSpec

pytestmark = pytest.mark.engine

BLOCK_SIZE = 8
CHUNK = 32

_SHAPE = {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": NATIVE_WINDOW}
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Hybrid:
    """A family whose layers differ.

    Attributes:
        layer_types: what each of its layers is.
        settings: what its configuration is given besides.
        config_class: Hugging Face's configuration class, by name.
        architecture: vLLM's name for it, where that isn't Hugging Face's.
    """

    layer_types: list[str]
    config_class: str
    settings: dict = field(default_factory=dict)
    architecture: str | None = None

    @property
    def family(self) -> Family:
        layers = {"num_hidden_layers": len(self.layer_types), "layer_types": self.layer_types}
        settings = _SHAPE | layers | self.settings
        return replace(FAMILIES["llama-2"], config_class=self.config_class, settings=settings)

    def save(self, folder: Path) -> Path:
        path = self.family.save(folder)
        if self.architecture is not None:
            config = json.loads((path / "config.json").read_text())
            config["architectures"] = [self.architecture]
            (path / "config.json").write_text(json.dumps(config))
        return path


HYBRIDS = {
    # Five windows to one full layer: six groups of one layer each.
    "gemma-3": Hybrid(
        [_SLIDING] * 5 + [_FULL],
        "Gemma3TextConfig",
        {
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 48,
            "rope_parameters": {
                _SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
                _FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    # As Ministral: a full layer before three windows. vLLM runs it as Mistral.
    "mistral": Hybrid(
        [_FULL, _SLIDING, _SLIDING, _SLIDING],
        "MinistralConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        architecture="MistralForCausalLM",
    ),
    # Alternating, with learned sinks.
    "gpt-oss": Hybrid(
        [_SLIDING, _FULL] * 2,
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
        },
    ),
}


def watch_groups(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Notes, at every allocation, how many blocks the request then holds in each group."""
    manager = kv_cache_manager(llm)
    held: list[list[int]] = []
    original = manager.allocate_slots

    def allocate_slots(request, *args, **kwargs):
        result = original(request, *args, **kwargs)
        groups = manager.get_blocks(request.request_id).blocks
        held.append([sum(not block.is_null for block in group) for group in groups])
        return result

    monkeypatch.setattr(manager, "allocate_slots", allocate_slots)
    return held


def assert_same_for_both_runners(llm: LLM) -> None:
    """vLLM's first and second model runner ask the layers for the same caches, and the scheduler,
    which knows no runner, has our manager for each."""
    first = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    specs = first.get_kv_cache_spec()
    assert specs == second_runner.get_kv_cache_spec(llm.llm_engine.vllm_config)
    assert all(type(spec) is LambdaSpec for spec in specs.values())
    managers = kv_cache_manager(llm).coordinator.single_type_managers
    assert all(type(manager) is LambdaManager for manager in managers)


def blocks_seen(pattern: LambdaPattern, position: int) -> int:
    """Blocks with a token that the query at a position sees."""
    return len({j // BLOCK_SIZE for j in range(position + 1) if pattern.visible(position, j)})


@pytest.mark.parametrize("one_table", [False, True], ids=["hybrid", "one-table"])
@pytest.mark.parametrize(
    ("name", "n_global", "n_local"),
    [
        ("gemma-3", 10, 48),
        ("gpt-oss", 10, 48),
        # The very window that the other layers have, and a smaller one.
        ("gemma-3", 10, NATIVE_WINDOW),
        ("mistral", 3, 16),
    ],
)
def test_windows_beside_the_pattern(
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    n_global: int,
    n_local: int,
    one_table: bool,
) -> None:
    """With the hybrid allocator and without: equal to the oracle, every group holds what its
    layers see and no more, a repeat is served from the cache, and the pool is whole afterwards."""
    hybrid = HYBRIDS[name]
    path = hybrid.save(tmp_path / "model")
    pattern = LambdaPattern(n_global, n_local, TRAINED_LENGTH)
    window = LambdaPattern(0, NATIVE_WINDOW, NATIVE_WINDOW)
    with engine(
        path,
        n_global=n_global,
        n_local=n_local,
        distance_limit=TRAINED_LENGTH,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=CHUNK,
        max_model_len=10_000,
        num_gpu_blocks_override=150,
        disable_hybrid_kv_cache_manager=one_table,
    ) as llm:
        pool = block_pool(llm)
        whole = pool.get_num_free_blocks()
        groups = kv_cache_manager(llm).kv_cache_config.kv_cache_groups
        kept = [group.kv_cache_spec.pattern for group in groups]
        assert set(kept) == ({pattern.union(window)} if one_table else {pattern, window})
        assert_same_for_both_runners(llm)
        held = watch_groups(llm, monkeypatch)

        *short, long = random_prompts([1, 23, 24, 25, 65, 400])
        results = engine_logprobs(llm, [*short, long], 8)
        assert held[-1] == [blocks_seen(each, 406) for each in kept]
        in_flight = llm.llm_engine.vllm_config.max_in_flight_tokens
        bounds = [each.max_blocks_held(BLOCK_SIZE, in_flight, 10_000) for each in kept]
        assert all(h <= b for step in held for h, b in zip(step, bounds, strict=True))
        assert pool.get_num_free_blocks() == whole

        sampling = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
        (again,) = llm.generate([{"prompt_token_ids": long}], sampling, use_tqdm=False)
        assert again.num_cached_tokens == 392
        assert [*long, *again.outputs[0].token_ids] == results[-1][0]
        assert pool.get_num_free_blocks() == whole

        other = {"prompt_token_ids": random_prompts([7, 400])[1]}
        llm.llm_engine.add_request("gone", other, sampling)
        for _ in range(5):
            llm.llm_engine.step()
        assert pool.get_num_free_blocks() < whole
        llm.llm_engine.abort_request(["gone"])
        llm.llm_engine.step()
        assert pool.get_num_free_blocks() == whole
    oracle = OracleModel(hybrid.family, path)
    for tokens, logprobs in results:
        expected = oracle.logprobs(tokens, pattern)
        assert torch.isfinite(logprobs).all()
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=TOLERANCE)
