"""Requests that are interrupted: preempted and resumed, or aborted, at any step."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.v1.core.sched.request_queue import PriorityRequestQueue
from vllm.v1.request import Request

from tests.engine.conftest import Engine, block_pool
from tests.engine.oracle_model import save_tiny_llama
from tests.engine.poison import assert_poison_changes_no_bit, poisoned
from tests.engine.traffic import (
    Answer,
    CacheView,
    alone,
    ask,
    assert_equal_to_oracle,
    block_manager,
    finish,
    lambda_pattern,
    num_held,
    scheduler,
    step,
    submit,
    tokens,
)

pytestmark = pytest.mark.engine

BLOCK = 16
CHUNK = 48
# Two pinned blocks, seven for the window and the chunk, one for their offset.
CAP = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), 4, 2, 64, trained_length=64)


def start(engine: Engine, model: Path, num_blocks: int, **arguments: Any) -> Iterator[LLM]:
    with engine(
        model,
        n_global=20,
        n_local=64,
        block_size=BLOCK,
        max_num_batched_tokens=CHUNK,
        max_model_len=10_000,
        num_gpu_blocks_override=1 + num_blocks,
        **arguments,
    ) as llm:
        assert block_manager(llm).max_admission_blocks_per_request == CAP
        yield llm


class TestPoolTooSmallForAll:
    """Six requests whose prompts fit and whose answers do not: each grows to eight blocks, past its
    window, in a pool of 22. The later ones are preempted again and again, the fifth in the middle
    of its prompt."""

    PROMPTS = tuple(tokens(n, seed=n) for n in (10, 40, 70, 25, 700, 60))
    NEW = 90

    @pytest.fixture(
        scope="class",
        params=[
            {},
            {"enable_prefix_caching": False},
            {"scheduling_policy": "priority"},
        ],
        ids=["cached", "uncached", "priority"],
    )
    @classmethod
    def llm(
        cls, class_engine: Engine, model: Path, request: pytest.FixtureRequest
    ) -> Iterator[LLM]:
        yield from start(class_engine, model, 22, **request.param)

    @pytest.fixture
    def preempted(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
        """Requests as they were when they were preempted."""
        caught: list[Request] = []
        real = scheduler(llm)
        preempt = real._preempt_request

        def note(request: Request, *args: Any, **kwargs: Any) -> None:
            caught.append(copy.copy(request))
            preempt(request, *args, **kwargs)

        monkeypatch.setattr(real, "_preempt_request", note)
        return caught

    def submit_all(self, llm: LLM) -> None:
        """In the order of their priority, or against it where that is what counts."""
        requests = list(enumerate(self.PROMPTS))
        if isinstance(scheduler(llm).waiting, PriorityRequestQueue):
            requests.reverse()
        for number, prompt in requests:
            submit(llm, str(number), prompt, self.NEW, priority=number)

    def test_same_tokens_as_alone(self, llm: LLM, model: Path, preempted: list[Request]) -> None:
        def scenario() -> list[Answer]:
            self.submit_all(llm)
            answers = finish(llm, 5000)
            return [answers[str(number)] for number in range(len(self.PROMPTS))]

        answers = assert_poison_changes_no_bit(llm, scenario)
        computed = [(r.num_computed_tokens, r.num_prompt_tokens) for r in preempted]
        assert any(0 < tokens < prompt for tokens, prompt in computed), "none within its prompt"
        assert any(tokens > max(prompt, 64) for tokens, prompt in computed), "none past its window"
        assert_equal_to_oracle(model, answers, lambda_pattern(llm))
        expected = alone(llm, list(self.PROMPTS), self.NEW)
        assert [a.tokens for a in answers] == [a.tokens for a in expected]

    def test_abort_while_preempted(self, llm: LLM, model: Path, preempted: list[Request]) -> None:
        """The first one that is, as soon as it is; it holds nothing, and the others go on."""
        with poisoned(llm):
            assert llm.reset_prefix_cache()
            self.submit_all(llm)
            answers: dict[str, Answer] = {}
            while not preempted:
                answers |= step(llm)
            victim = preempted[0].request_id.rpartition("-")[0]
            assert victim not in num_held(llm)
            llm.llm_engine.abort_request([victim])
            answers |= finish(llm, 5000)
        assert answers.keys() == {str(n) for n in range(len(self.PROMPTS))} - {victim}
        assert_equal_to_oracle(model, list(answers.values()), lambda_pattern(llm))


class TestInterruptedAtEveryStep:
    """A prompt of five chunks and twelve more tokens, which cross a block's end and free a block,
    beside a shorter request that shares its first tokens."""

    LONG = tokens(230)
    SHORT = LONG[:50] + tokens(20, seed=1)
    NEW = 12

    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls, class_engine: Engine, model: Path) -> Iterator[LLM]:
        yield from start(class_engine, model, 40)

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, llm: LLM, model: Path) -> dict[str, list[int]]:
        """Each one's tokens when it runs alone."""
        answers = alone(llm, [cls.LONG, cls.SHORT], cls.NEW)
        assert_equal_to_oracle(model, answers, lambda_pattern(llm))
        return {"long": answers[0].tokens, "short": answers[1].tokens}

    def interrupted(
        self, llm: LLM, how: Callable[[], dict[str, Answer] | None]
    ) -> Iterator[tuple[int, dict[str, list[int]]]]:
        """Runs both requests, lets something happen after so many steps, and runs them to the end;
        for every number of steps that they take.

        Yields:
            The number of steps, and the tokens of the requests that ended.
        """
        unfinished, steps = True, 0
        while unfinished:
            assert llm.reset_prefix_cache()
            submit(llm, "short", self.SHORT, self.NEW)
            submit(llm, "long", self.LONG, self.NEW)
            answers: dict[str, Answer] = {}
            for _ in range(steps):
                answers |= step(llm)
            unfinished = llm.llm_engine.has_unfinished_requests()
            answers |= how() or {}
            answers |= finish(llm, 100)
            yield steps, {name: answer.tokens for name, answer in answers.items()}
            steps += 1
        # Five chunks, and a step for each new token but the first.
        assert steps > 5 + self.NEW - 1

    def test_preempted(self, llm: LLM, expected: dict[str, list[int]]) -> None:
        """Both, and the prefix cache emptied: all is computed again."""

        def preempt() -> None:
            assert llm.reset_prefix_cache(reset_running_requests=True)

        with poisoned(llm):
            for steps, answers in self.interrupted(llm, preempt):
                assert answers == expected, f"preempted after {steps} steps"

    def test_out_of_blocks(self, llm: LLM, expected: dict[str, list[int]]) -> None:
        """Somebody else takes every free block until nothing goes on, and then gives them back.
        What the cache has kept isn't computed again."""
        pool, real = block_pool(llm), scheduler(llm)

        def starve() -> dict[str, Answer]:
            answers: dict[str, Answer] = {}
            taken = pool.get_new_blocks(pool.get_num_free_blocks())
            while real.running:
                answers |= step(llm)
                taken += pool.get_new_blocks(pool.get_num_free_blocks())
            pool.free_blocks(taken)
            return answers

        with poisoned(llm):
            for steps, answers in self.interrupted(llm, starve):
                assert answers == expected, f"starved after {steps} steps"

    @pytest.mark.parametrize("victims", [["long"], ["long", "short"]], ids=str)
    def test_aborted(self, llm: LLM, expected: dict[str, list[int]], victims: list[str]) -> None:
        """Nothing is held afterwards, nobody else notices, and what the victims left in the cache
        is right: the same request, started again, goes on from there."""

        def abort() -> None:
            llm.llm_engine.abort_request(victims)
            assert not num_held(llm).keys() & set(victims)

        hits = set()
        with poisoned(llm):
            for steps, answers in self.interrupted(llm, abort):
                assert answers.keys() >= expected.keys() - set(victims)
                assert all(answers[name] == expected[name] for name in answers)
                known = CacheView(llm, self.LONG).longest_hit()
                (again,) = ask(llm, [self.LONG], self.NEW)
                assert again.tokens == expected["long"], f"aborted after {steps} steps"
                assert again.num_cached == known
                hits.add(known)
        assert len(hits) > 3
