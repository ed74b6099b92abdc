"""The middle recalled in vLLM's own engine for GPUs: its newer runner, scheduler and sampler."""

from pathlib import Path

import pytest
from vllm import LLM
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from tests.engine.conftest import archive_manager, block_pool
from tests.engine.traffic import ask, assert_equal_to_oracle, lambda_pattern, tokens
from tests.vllm_cuda.engine.conftest import MIDDLE, PAGES
from vllm_lminf.plugin import metrics, search_counts
from vllm_lminf.plugin.archive_backend import Archive
from vllm_lminf.plugin.metrics import ARCHIVE_SIZE, SEARCHES, SEARCHES_REPEATED

pytestmark = pytest.mark.engine


def runner(llm: LLM) -> GPUModelRunner:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def archives(llm: LLM) -> list[Archive]:
    layers = runner(llm).compilation_config.static_forward_context.values()
    return [layer for layer in layers if isinstance(layer, Archive)]


def shown(llm: LLM) -> dict[str, float]:
    return {m.name.removeprefix("vllm:"): m.value for m in llm.get_metrics() if "lminf" in m.name}


def test_the_warm_up_stays_in_the_null_page(llm: LLM) -> None:
    """Its requests draw blocks from the device's pool, of which there are more than pages."""
    assert type(runner(llm)) is GPUModelRunner
    (archive,) = archives(llm)
    assert archive.pages is not None
    assert len(archive.pages) == PAGES
    assert block_pool(llm).num_gpu_blocks > 2 * PAGES
    assert archive.pages[0].any()
    assert not archive.pages[1:].any()
    assert not runner(llm).block_tables.redirect_writes_to_null_block


def test_equal_to_the_oracle(llm: LLM, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in one chunk and in two, below and beyond the window; the archive has room for one
    of the long ones at a time, and the other waits. Searches are counted."""
    monkeypatch.setattr(metrics, "INTERVAL_S", 0)
    monkeypatch.setattr(search_counts, "INTERVAL_S", 0)
    answers = ask(llm, [tokens(n, seed=n) for n in (3, 60, 70)], 3)
    assert_equal_to_oracle(model, answers, lambda_pattern(llm), MIDDLE)
    assert archive_manager(llm).num_pages_held == 0
    numbers = shown(llm)
    assert numbers[ARCHIVE_SIZE] == PAGES - 1
    # Two heads, for the last four rows of the long prompts and two of the tokens behind them. What
    # the last two steps did isn't told yet.
    assert 0 < numbers[SEARCHES] <= 2 * 2 * (4 + 2)
    assert numbers[SEARCHES_REPEATED] <= numbers[SEARCHES]


def test_blocks_of_an_earlier_request(llm: LLM, model: Path) -> None:
    """A prompt's first blocks and pages are found again, where none of its rows looked."""
    (first,) = ask(llm, [tokens(60, seed=60)], 1)
    (again,) = ask(llm, [tokens(60, seed=60)[:50] + tokens(20, seed=2)], 2)
    assert_equal_to_oracle(model, [first, again], lambda_pattern(llm), MIDDLE)
    assert again.num_cached == 48
