"""What is told of an engine: once, however many of its layers have it to say, and again of the next
engine of the process."""

import copy

import pytest
from vllm.config import VllmConfig

from vllm_lminf.plugin import log


@pytest.fixture
def engine(stock_config: VllmConfig) -> VllmConfig:
    engine = copy.copy(stock_config)
    engine.compilation_config = copy.copy(stock_config.compilation_config)
    return engine


def test_once_an_engine(engine: VllmConfig, said: list[str]) -> None:
    draft = copy.copy(engine)
    for each in (engine, engine, draft):
        log.warning(each, "%s is %d", "n_local", 64)
    log.warning(engine, "%s is %d", "n_local", 128)
    assert said == ["n_local is 64", "n_local is 128"]


def test_again_of_the_next_engine(engine: VllmConfig, said: list[str]) -> None:
    following = copy.copy(engine)
    following.compilation_config = copy.copy(engine.compilation_config)
    for each in (engine, engine, following, following):
        log.warning(each, "all is well")
    assert said == ["all is well", "all is well"]


def test_from_one_process_of_a_machine(
    engine: VllmConfig, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "is_local_first_rank", lambda: False)
    log.warning(engine, "n_local is 64")
    assert said == []
