"""Chunked prefill: any chunk gives the same logits, and no prompt is too long for the pool."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from tests.engine.conftest import Engine, block_pool
from tests.engine.oracle_model import save_tiny_llama
from tests.engine.poison import assert_poison_changes_no_bit
from tests.engine.test_exactness import assert_equal_to_oracle as assert_prompts_equal_to_oracle
from tests.engine.traffic import (
    Answer,
    CacheView,
    alone,
    ask,
    assert_equal_to_oracle,
    block_manager,
    chunks_of,
    finish,
    lambda_pattern,
    num_held,
    scheduler,
    step,
    submit,
    tokens,
)
from vllm_lminf.pattern import cdiv

pytestmark = pytest.mark.engine

BLOCK = 16
N_GLOBAL = 20
N_LOCAL = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), 4, 2, 64, trained_length=N_LOCAL)


class TestChunkSize:
    """No two chunk sizes give the same bits: a matrix product sums in an order that depends on how
    many rows it has, and the window's tiles begin where the chunk does. So every chunk size is held
    against the oracle, and against itself under poison."""

    PROMPT = tokens(300)

    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls, class_engine: Engine, model: Path) -> Iterator[LLM]:
        with class_engine(
            model,
            n_global=N_GLOBAL,
            n_local=N_LOCAL,
            block_size=BLOCK,
            max_num_batched_tokens=1000,
            max_model_len=10_000,
            num_gpu_blocks_override=200,
        ) as llm:
            yield llm

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, llm: LLM) -> Answer:
        """The answer when the prompt is one chunk."""
        (answer,) = ask(llm, [cls.PROMPT], 24)
        return answer

    @pytest.mark.parametrize("size", [1, 2, 7, 15, 16, 17, 47, 63, 64, 65, 128, 299, 300, 1000])
    def test_same_logits(self, llm: LLM, model: Path, whole: Answer, size: int) -> None:
        """Of every token of the prompt, and of those that are generated."""
        with chunks_of(llm, size):
            (answer,) = assert_poison_changes_no_bit(llm, lambda: ask(llm, [self.PROMPT], 24))
            assert answer.tokens == whole.tokens
            if size >= len(self.PROMPT):
                assert answer == whole
            assert_prompts_equal_to_oracle(llm, model, [self.PROMPT], lambda_pattern(llm), 24)

    def test_another_size_at_every_step(self, llm: LLM, model: Path) -> None:
        """Of several requests, so that each is cut anywhere, and beside others that are cut
        elsewhere."""
        prompts = [tokens(n, seed=n) for n in (1, 17, 64, 150, 300, 450)]

        def scenario() -> list[Answer]:
            rng = random.Random(0)
            for number, prompt in enumerate(prompts):
                submit(llm, str(number), prompt, 24)
            answers: dict[str, Answer] = {}
            while llm.llm_engine.has_unfinished_requests():
                with chunks_of(llm, rng.choice([1, 2, 3, 5, 16, 33, 64, 100, 300])):
                    answers |= step(llm)
            return [answers[str(number)] for number in range(len(prompts))]

        answers = assert_poison_changes_no_bit(llm, scenario)
        assert_equal_to_oracle(model, answers, lambda_pattern(llm))
        assert [a.tokens for a in answers] == [ask(llm, [p], 24)[0].tokens for p in prompts]


class Watch:
    """Looks at every step of an engine's scheduler."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self._llm = llm
        self._scheduler = scheduler(llm)
        self._schedule = self._scheduler.schedule
        monkeypatch.setattr(self._scheduler, "schedule", self._check)

    def _check(self, *args: bool) -> SchedulerOutput:
        real = self._scheduler
        output = self._schedule(*args)
        num_tokens = output.total_num_scheduled_tokens
        assert num_tokens > 0 or real.get_num_unfinished_requests() == 0, "nothing goes on"
        cap = block_manager(self._llm).max_admission_blocks_per_request
        assert all(held <= cap for held in num_held(self._llm).values())
        # A step that had to take the room from one request admits no other.
        may_admit = (
            not output.preempted_req_ids
            and num_tokens < real.max_num_scheduled_tokens
            and len(real.running) < real.max_num_running_reqs
        )
        if may_admit and real.waiting:
            first = real.waiting.peek_request()
            assert self._needs(first) > block_pool(self._llm).get_num_free_blocks(), (
                f"{first.request_id} holds up the queue, and could run"
            )
        return output

    def _needs(self, request: Request) -> int:
        """The most blocks that a request takes from the free ones until all of it is computed."""
        hit, kept = 0, []
        if block_pool(self._llm).enable_caching:
            view = CacheView(self._llm, list(request.all_token_ids))
            hit = view.longest_hit()
            kept = [view.block(entry) for entry in view.needed(hit)]
        lacking = cdiv(request.num_tokens, BLOCK) - hit // BLOCK
        cap = block_manager(self._llm).max_admission_blocks_per_request
        return min(lacking, cap - len(kept)) + sum(block.ref_cnt == 0 for block in kept)


# Most tokens of a step, room for how many requests of any length, prefix caching
POOLS = [(1, 1, False), (40, 1, True), (40, 2.5, False), (200, 1.3, True)]


class TestSmallPool:
    """Prompts of many times the pool, several at once, in the smallest pool that an engine starts
    with, and in pools that have room for a request and a part of another."""

    @pytest.mark.parametrize(("chunk", "room", "caching"), POOLS)
    def test_no_prompt_is_too_long(
        self,
        engine: Engine,
        model: Path,
        monkeypatch: pytest.MonkeyPatch,
        chunk: int,
        room: float,
        caching: bool,
    ) -> None:
        # Two pinned blocks, the window behind the chunk and the chunk, and one for their offset.
        cap = 2 + cdiv(N_LOCAL - 1 + chunk, BLOCK) + 1
        num_blocks = int(room * cap)
        lengths = [1, 30, 3 * num_blocks * BLOCK, 8 * num_blocks * BLOCK, N_LOCAL, 700, 1000, 5]
        if chunk == 1:
            lengths = [1, 30, 3 * num_blocks * BLOCK, N_LOCAL]
        prompts = [tokens(n, seed=n) for n in lengths]
        with engine(
            model,
            n_global=N_GLOBAL,
            n_local=N_LOCAL,
            block_size=BLOCK,
            max_num_batched_tokens=chunk,
            max_num_seqs=min(chunk, 5),
            max_model_len=100_000,
            num_gpu_blocks_override=1 + num_blocks,
            enable_prefix_caching=caching,
        ) as llm:
            assert block_manager(llm).max_admission_blocks_per_request == cap
            Watch(llm, monkeypatch)

            def scenario() -> list[Answer]:
                for number, prompt in enumerate(prompts):
                    submit(llm, str(number), prompt, 20)
                answers = finish(llm, 2 * num_steps_alone)
                # What goes on where the one before it ended, and needs all of the smallest pool.
                ask(llm, [prompts[2]], 1)
                (longer,) = ask(llm, [prompts[2] + tokens(num_blocks * BLOCK)], 20)
                assert (longer.num_cached > 0) == caching
                return [*(answers[str(number)] for number in range(len(prompts))), longer]

            # Steps if each had the engine to itself.
            num_steps_alone = sum(cdiv(n, chunk) + 20 for n in lengths)
            answers = assert_poison_changes_no_bit(llm, scenario)
            short = [a for a in answers if len(a.prompt) <= 1000]
            assert_equal_to_oracle(model, short, lambda_pattern(llm))
            for answer in answers:
                if answer not in short:
                    (again,) = alone(llm, [answer.prompt], 20)
                    assert again.tokens == answer.tokens

    def test_a_pool_too_small_is_refused(self, engine: Engine, model: Path) -> None:
        cap = 2 + cdiv(N_LOCAL - 1 + 40, BLOCK) + 1
        with (
            pytest.raises(ValueError, match="at least one request"),
            engine(
                model,
                n_global=N_GLOBAL,
                n_local=N_LOCAL,
                block_size=BLOCK,
                max_num_batched_tokens=40,
                max_model_len=100_000,
                num_gpu_blocks_override=cap,
            ),
        ):
            pass
