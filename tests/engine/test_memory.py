"""Blocks under a real engine: the bound, the pool afterwards, and nothing read once it is freed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.engine.conftest import Engine, block_pool, kv_cache_manager
from tests.engine.oracle_model import save_tiny_llama
from tests.engine.poison import poisoned
from tests.engine.test_exactness import engine_logprobs, random_prompts
from tests.engine.traffic import block_manager
from vllm_lminf.pattern import LambdaPattern, cdiv

pytestmark = pytest.mark.engine


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model", 4, 2, 64, trained_length=1024)


def watch_held_blocks(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes, at every allocation, how many blocks the request then holds."""
    manager = kv_cache_manager(llm)
    held: list[int] = []
    original = manager.allocate_slots

    def allocate_slots(request, *args, **kwargs):
        result = original(request, *args, **kwargs)
        blocks = manager.coordinator.single_type_managers[0].req_to_blocks[request.request_id]
        held.append(sum(not block.is_null for block in blocks))
        return result

    monkeypatch.setattr(manager, "allocate_slots", allocate_slots)
    return held


def test_prompt_of_four_pools(
    engine: Engine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12k tokens run to the end in a pool of 3k, twice (the second time from the prefix cache),
    and an aborted one leaves nothing behind."""
    with engine(
        tiny_model,
        n_local=1024,
        block_size=128,
        num_gpu_blocks_override=24,
        max_num_batched_tokens=1024,
        max_model_len=1_000_000,
    ) as llm:
        pool = block_pool(llm)
        whole = pool.get_num_free_blocks()
        assert pool.num_gpu_blocks == 24
        held = watch_held_blocks(llm, monkeypatch)
        prompt = random_prompts([12_000])
        ((first, _),) = engine_logprobs(llm, prompt, 200)
        assert len(first) == 12_200
        pattern = LambdaPattern(10, 1024, 1024)
        in_flight = llm.llm_engine.vllm_config.max_in_flight_tokens
        assert max(held) <= pattern.max_blocks_held(128, in_flight, 1_000_000)
        # In decode: one pinned block, and the window of 1024 spread over nine blocks at the most.
        assert max(held[-190:]) <= 1 + cdiv(1024, 128) + 1
        assert pool.get_num_free_blocks() == whole

        cached = SamplingParams(temperature=0, max_tokens=200, detokenize=False, ignore_eos=True)
        (again,) = llm.generate([{"prompt_token_ids": prompt[0]}], cached, use_tqdm=False)
        assert again.num_cached_tokens >= 11_000
        assert list(again.outputs[0].token_ids) == first[12_000:]
        assert pool.get_num_free_blocks() == whole

        other = random_prompts([1, 12_000])[1]
        llm.llm_engine.add_request("gone", {"prompt_token_ids": other}, cached)
        for _ in range(5):
            llm.llm_engine.step()
        assert pool.get_num_free_blocks() < whole
        llm.llm_engine.abort_request(["gone"])
        llm.llm_engine.step()
        assert pool.get_num_free_blocks() == whole


class TestPoison:
    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls, class_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
        model = save_tiny_llama(tmp_path_factory.mktemp("model"), 4, 2, 64, trained_length=1024)
        with class_engine(
            model,
            n_global=10,
            n_local=200,
            block_size=16,
            max_num_batched_tokens=96,
            max_model_len=10_000,
            enable_prefix_caching=False,
        ) as llm:
            yield llm

    def test_changes_no_bit(self, llm: LLM) -> None:
        prompts = random_prompts([1, 199, 200, 201, 1500])
        clean = engine_logprobs(llm, prompts, 40)
        with poisoned(llm) as poison:
            again = engine_logprobs(llm, prompts, 40)
        assert poison.num_filled > 100
        for (tokens, logprobs), (tokens_again, logprobs_again) in zip(clean, again, strict=True):
            assert tokens == tokens_again
            assert torch.equal(logprobs, logprobs_again)
            assert torch.isfinite(logprobs).all()

    def test_shows_a_block_freed_too_early(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        """A manager whose window is one token short. Without poison nobody would see it here: a
        freed block keeps its contents until it is reused."""
        prompts = random_prompts([400])
        ((_, right),) = engine_logprobs(llm, prompts, 40)
        monkeypatch.setattr(block_manager(llm), "pattern", LambdaPattern(10, 199, 199))
        ((_, lucky),) = engine_logprobs(llm, prompts, 40)
        assert torch.equal(lucky, right)
        with poisoned(llm):
            ((_, spoilt),) = engine_logprobs(llm, prompts, 40)
        assert spoilt.isnan().any()

    def test_shows_a_write_to_a_free_block(self, llm: LLM) -> None:
        with (
            pytest.raises(AssertionError, match="written while nobody held it"),
            poisoned(llm) as p,
        ):
            p.caches[0][7, 0, 3, 5] = 1.0
