"""Speculative decoding: drafts accepted and rejected wherever the window moves on and a block is
freed; the same tokens as without, and nothing read once it is freed."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from vllm import LLM

from tests.engine import drafters
from tests.engine.conftest import Engine, start_engine
from tests.engine.drafters import TRAINED_LENGTH, following, save_counting_model
from tests.engine.poison import assert_poison_changes_no_bit
from tests.engine.test_middle import settings
from tests.engine.traffic import (
    TOLERANCE,
    Answer,
    ask,
    assert_equal_to_oracle,
    finish,
    lambda_pattern,
    scheduler,
    step,
    submit,
)
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern

pytestmark = pytest.mark.engine

BLOCK = 16
PATTERN = LambdaPattern(10, TRAINED_LENGTH, TRAINED_LENGTH)
MAX_TOKENS = 64

# Some that reach the window's length, where the first token leaves it, while they are answered,
# some that are past it, and one that is longer than the pool.
LENGTHS = [1, 44, 46, 48, 50, 52, 54, 56, 58, 59, 60, 61, 62, 63, 200, 700]

# A pool of 40 blocks of 16: 640 tokens.
ARGUMENTS: dict[str, Any] = {
    "n_global": 10,
    "block_size": BLOCK,
    "num_gpu_blocks_override": 41,
    "max_num_batched_tokens": 96,
    "max_model_len": 10_000,
}


def prompts() -> list[list[int]]:
    """Random starts; then mostly what the model would count itself."""
    generator = torch.Generator().manual_seed(3)
    counts = following().tolist()
    result = []
    for length in LENGTHS:
        tokens = torch.randint(0, 512, (length,), generator=generator).tolist()
        stay = torch.rand(length, generator=generator)
        for i in range(1, length):
            if stay[i] < 0.7:
                tokens[i] = counts[tokens[i - 1]]
        result.append(tokens)
    return result


@dataclass(frozen=True)
class Draft:
    """What became of the drafts of one request in one step.

    Attributes:
        start: tokens computed before the step; its first query is at this position.
        num_proposed, num_accepted: drafts.
    """

    start: int
    num_proposed: int
    num_accepted: int

    @property
    def after(self) -> int:
        """Tokens computed once the step is settled; one beside the accepted drafts was certain."""
        return self.start + 1 + self.num_accepted

    @property
    def hoped(self) -> int:
        """Tokens computed if every draft had been accepted."""
        return self.start + 1 + self.num_proposed


@contextmanager
def watch_drafts(llm: LLM) -> Iterator[list[Draft]]:
    """Notes every draft that the scheduler counts into vLLM's statistics."""
    real = scheduler(llm)
    count = real.make_spec_decoding_stats
    drafts: list[Draft] = []

    def make_spec_decoding_stats(*args: Any, **kwargs: Any) -> Any:
        num_proposed, num_accepted = kwargs["num_draft_tokens"], kwargs["num_accepted_tokens"]
        # Rejected drafts are taken off by now.
        after = real.requests[kwargs["request_id"]].num_computed_tokens
        drafts.append(Draft(after - 1 - num_accepted, num_proposed, num_accepted))
        return count(*args, **kwargs)

    with mock.patch.object(real, "make_spec_decoding_stats", make_spec_decoding_stats):
        yield drafts


def num_freed(num_computed: int) -> int:
    return sum(map(len, PATTERN.freed_blocks(num_computed, BLOCK)))


def assert_boundaries_were_crossed(drafts: list[Draft]) -> None:
    """By accepted and by rejected drafts, at the window's length and at a block's end."""
    window = TRAINED_LENGTH
    assert any(d.start + 1 <= window < d.after for d in drafts)
    assert any(d.after <= window < d.hoped for d in drafts)
    assert any(num_freed(d.start + 1) < num_freed(d.after) for d in drafts)
    # Had all been accepted, a block would have gone that the next query still sees.
    assert any(num_freed(d.after) < num_freed(d.hoped) for d in drafts)


def assert_same(answers: list[Answer], expected: list[Answer]) -> None:
    """Same tokens, and log-probabilities as close as batches of other shapes make them."""
    for answer, other in zip(answers, expected, strict=True):
        assert answer.tokens == other.tokens
        for got, wanted in zip(answer.logprobs, other.logprobs, strict=True):
            both = got.keys() & wanted.keys()
            assert len(both) >= 5
            for token in both:
                assert got[token] == pytest.approx(wanted[token], rel=0, abs=2 * TOLERANCE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_counting_model(tmp_path_factory.mktemp("speculative") / "model")


@pytest.fixture(scope="class")
def expected(class_engine: Engine, model: Path) -> list[Answer]:
    """The answers without speculation, which the oracle gives too."""
    with class_engine(model, **ARGUMENTS) as llm:
        answers = ask(llm, prompts(), MAX_TOKENS)
    assert_equal_to_oracle(model, answers[-2:], PATTERN)
    return answers


Happened = tuple[list[Answer], list[Draft]]


def everything_that_happens(llm: LLM) -> Happened:
    """All requests at once; all are preempted on the way, one is aborted; then one twice
    more, from the prefix cache."""
    with watch_drafts(llm) as drafts:
        for number, prompt in enumerate(prompts()):
            submit(llm, str(number), prompt, MAX_TOKENS)
        submit(llm, "gone", prompts()[-1][::-1], MAX_TOKENS)
        answers: dict[str, Answer] = {}
        for count in range(40):
            answers |= step(llm)
            if count == 20:
                assert llm.reset_prefix_cache(reset_running_requests=True)
        llm.llm_engine.abort_request(["gone"])
        answers |= finish(llm)
        first = [answers[str(number)] for number in range(len(LENGTHS))]
        twice = [ask(llm, [prompts()[-2]], MAX_TOKENS)[0] for _ in range(2)]
        assert twice[1].num_cached > 150
    return first + twice, drafts


def run(
    engine: Engine, model: Path, speculative_config: dict[str, Any], middle: Middle | None = None
) -> Happened:
    """Everything that happens, with nothing else in the cache and under poison."""
    recalled = None if middle is None else settings(middle)
    with engine(model, speculative_config=speculative_config, middle=recalled, **ARGUMENTS) as llm:
        assert lambda_pattern(llm) == PATTERN
        return assert_poison_changes_no_bit(llm, lambda: everything_that_happens(llm))


def run_in_another_process(
    engine: Engine, model: Path, speculative_config: dict[str, Any], middle: Middle | None = None
) -> Happened:
    """The same. vLLM's n-gram drafter imports numba, and vLLM's CPU platform can't start an engine
    in a process that has done so. Uncompiled, numba's functions do the same and start at once."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        arguments = start_engine, model, speculative_config, middle
        return pool.submit(_run_uncompiled, *arguments).result()


def _run_uncompiled(*arguments: Any) -> Happened:
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    return run(*arguments)


class TestSameTokens:
    @pytest.mark.parametrize(
        ("drafter", "run"),
        [
            (drafters.ngram, run_in_another_process),
            (drafters.draft_model, run),
            (drafters.short_draft_model, run),
            (drafters.eagle, run),
            (drafters.medusa, run),
        ],
    )
    def test_as_without_drafts(
        self,
        class_engine: Engine,
        model: Path,
        expected: list[Answer],
        drafter: Callable[[Path], dict[str, Any]],
        run: Callable[..., Happened],
    ) -> None:
        answers, drafts = run(class_engine, model, drafter(model))
        assert_same(answers, expected + 2 * [expected[-2]])
        assert_boundaries_were_crossed(drafts)


def test_drafts_in_the_archive(class_engine: Engine, model: Path) -> None:
    """Rejected drafts are kept and indexed with the rest, in pages that they fill: what comes
    after them overwrites them."""
    middle = Middle(4, distance=30, rows=20, from_layer=2)
    with class_engine(model, middle=settings(middle), **ARGUMENTS) as llm:
        expected = ask(llm, prompts(), MAX_TOKENS)
    assert_equal_to_oracle(model, expected[-2:], PATTERN, middle)
    answers, drafts = run_in_another_process(class_engine, model, drafters.ngram(model), middle)
    assert_same(answers, expected + 2 * [expected[-2]])
    assert any(d.after // BLOCK < d.hoped // BLOCK for d in drafts)
    assert any(d.start // BLOCK < d.after // BLOCK for d in drafts)
