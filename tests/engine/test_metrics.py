"""The numbers that operators see, against the state of a real engine's pool after every step."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from vllm import LLM, SamplingParams
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.metrics.loggers import LoggingStatLogger

from tests.engine.conftest import Engine, block_pool, kv_cache_manager
from tests.engine.oracle_model import save_tiny_llama
from tests.engine.test_exactness import random_prompts
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import metrics
from vllm_lminf.plugin.metrics import BLOCKS_FREED, BLOCKS_PINNED, TOKENS_OUTSIDE

pytestmark = pytest.mark.engine

BLOCK_SIZE = 16
PATTERN = LambdaPattern(n_global=20, n_local=50, distance_limit=60)


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model", 2, 1, 32, num_layers=1)


def shown(llm: LLM) -> dict[str, float]:
    """The plugin's numbers as vLLM's own reader of metrics gives them, by the name's end."""
    ours = [m for m in llm.get_metrics() if m.name.startswith("vllm:lminf_")]
    return {m.name.removeprefix("vllm:"): m.value for m in ours}


def labels(llm: LLM, name: str) -> dict[str, str]:
    (metric,) = [m for m in llm.get_metrics() if m.name == name]
    return metric.labels


def pinned_blocks(llm: LLM) -> int:
    """Blocks that hold a global token of some request, each once."""
    lists = kv_cache_manager(llm).coordinator.single_type_managers[0].req_to_blocks.values()
    last = (PATTERN.n_global - 1) // BLOCK_SIZE
    pinned = {id(block) for blocks in lists for block in blocks[: last + 1]}
    assert not any(block.is_null for blocks in lists for block in blocks[: last + 1])
    return len(pinned)


def tokens_outside(llm: LLM) -> int:
    """Tokens that the next query doesn't see, counted one by one."""
    requests = llm.llm_engine.engine_core.engine_core.scheduler.requests.values()
    return sum(
        not PATTERN.visible(request.num_computed_tokens, j)
        for request in requests
        for j in range(request.num_computed_tokens)
    )


def count_blocks_freed_while_running(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of the blocks that the pool gets back, those of requests that end left out."""
    pool, manager = block_pool(llm), kv_cache_manager(llm)
    freed: list[int] = []
    ending: list[bool] = []
    free_blocks, free = pool.free_blocks, manager.free

    def watched_free_blocks(ordered_blocks: Iterable[KVCacheBlock]) -> None:
        blocks = list(ordered_blocks)
        free_blocks(blocks)
        if not ending:
            freed.extend(block.block_id for block in blocks if block.ref_cnt == 0)

    def watched_free(request) -> None:
        ending.append(True)
        free(request)
        ending.pop()

    monkeypatch.setattr(pool, "free_blocks", watched_free_blocks)
    monkeypatch.setattr(manager, "free", watched_free)
    return freed


def test_numbers_are_the_pool_after_every_step(
    engine: Engine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts that share all their blocks up to the window, one alone, one that never leaves
    the window; one is aborted on the way."""
    monkeypatch.setattr(metrics, "INTERVAL_S", 0)
    with engine(
        tiny_model,
        n_global=PATTERN.n_global,
        n_local=PATTERN.n_local,
        distance_limit=PATTERN.distance_limit,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=60,
        max_num_batched_tokens=96,
        max_model_len=10_000,
        served_model_name="tiny",
        disable_log_stats=False,
    ) as llm:
        info = labels(llm, "vllm:lminf_config_info")
        settings = {"n_global": "20", "n_local": "50", "distance_limit": "60"}
        assert info == settings | {"model_name": "tiny", "engine": "0"}
        zeros = {BLOCKS_PINNED: 0, BLOCKS_FREED: 0, TOKENS_OUTSIDE: 0, "lminf_config_info": 1}
        assert shown(llm) == zeros

        freed = count_blocks_freed_while_running(llm, monkeypatch)
        long, other, short = random_prompts([400, 300, 9])
        prompts = {"first": long, "other": other, "short": short}
        add(llm, prompts)
        seen = []
        for step in range(400):
            if step == 12:
                add(llm, {"same": long[:390] + other[:30]})
            if step == 20:
                llm.llm_engine.abort_request(["other"])
            llm.llm_engine.step()
            numbers = shown(llm)
            assert numbers[BLOCKS_PINNED] == pinned_blocks(llm)
            assert numbers[TOKENS_OUTSIDE] == tokens_outside(llm)
            assert numbers[BLOCKS_FREED] == len(freed)
            num_requests = llm.llm_engine.get_num_unfinished_requests()
            seen.append((num_requests, numbers[BLOCKS_PINNED], numbers[TOKENS_OUTSIDE]))
            if not llm.llm_engine.has_unfinished_requests():
                break
        # Two blocks each, and four requests hold no more than three: "same" has those of "first".
        assert max(num_requests for num_requests, _, _ in seen) == 4
        assert max(pinned for _, pinned, _ in seen) == 6
        assert max(outside for _, _, outside in seen) > 600
        assert len(freed) > 30
        assert shown(llm) == zeros | {BLOCKS_FREED: len(freed)}

        (logger,) = [
            logger.per_engine_stat_loggers[0]
            for logger in llm.llm_engine.logger_manager.stat_loggers
            if hasattr(logger, "per_engine_stat_loggers")
        ]
        assert isinstance(logger, LoggingStatLogger)
        carried = logger.last_scheduler_stats.num_kv_fetch_reqs_by_stage
        assert not any(name.startswith("lminf") for name in carried)


def add(llm: LLM, prompts: dict[str, list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, detokenize=False, ignore_eos=True)
    for name, prompt in prompts.items():
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)


def test_nothing_is_shown_where_lminf_is_not_selected(engine: Engine, tiny_model: Path) -> None:
    """Stock vLLM in the same process, after an engine with LMINF ran in it."""
    sizes = {"block_size": 32, "num_gpu_blocks_override": 40, "disable_log_stats": False}
    names = {}
    for backend in ("LMINF", None):
        with engine(tiny_model, backend=backend, **sizes) as llm:
            add(llm, {"only": random_prompts([30])[0]})
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
            names[backend] = {metric.name for metric in llm.get_metrics()}
    ours = {f"vllm:{name}" for name in (BLOCKS_PINNED, BLOCKS_FREED, TOKENS_OUTSIDE)}
    assert names["LMINF"] == names[None] | ours | {"vllm:lminf_config_info"}
