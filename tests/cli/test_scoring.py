"""How an engine is stepped and read, with an engine that plays back a script."""

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_lminf.cli.child import Answers
from vllm_lminf.cli.scoring import ScoringEngine, length_figures
from vllm_lminf.cli.scoring_job import DecodeRun, PrefillStep, ScoringJob


class ScriptedLLM:
    """Takes ``chunk`` tokens a step and one block per ``block`` tokens, like vLLM.

    As vLLM's engine core does, it answers once more after a request has ended, with nothing in it.
    """

    def __init__(self, job: ScoringJob, *, block: int, chunk: int | None = None) -> None:
        self.job, self.block, self.chunk = job, block, chunk or job.chunk
        self.pool = 64
        self.request: dict[str, Any] | None = None
        self.tidy = False
        self.running = self.used = 0
        self.resets = 0
        config = SimpleNamespace(
            cache_config=SimpleNamespace(block_size=block, num_gpu_blocks=self.pool)
        )
        self.llm_engine = SimpleNamespace(
            vllm_config=config,
            add_request=self.add_request,
            step=self.step,
            has_unfinished_requests=lambda: self.request is not None,
        )

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        ids = prompt["prompt_token_ids"]
        cached = 0 if params.prompt_logprobs is not None else (len(ids) - 1) // 4 * 4
        self.request = {
            "ids": ids, "params": params, "done": cached, "cached": cached, "made": 0,
        }  # fmt: skip

    def step(self) -> list[Any]:
        time.sleep(0.001)
        if self.tidy:
            self.tidy, self.running, self.used = False, 0, 0
            return []
        request = self.request
        assert request is not None
        ids, params = request["ids"], request["params"]
        if request["made"] == 0:
            request["done"] = min(request["done"] + self.chunk, len(ids))
        else:
            request["done"] += 1
        self.running, self.used = 1, -(-request["done"] // self.block)
        if request["done"] < len(ids):
            return []
        request["made"] += 1
        if request["made"] == params.max_tokens:
            self.request, self.tidy, self.running, self.used = None, True, 0, 0
        logprobs = [None, *({i: SimpleNamespace(logprob=-float(i))} for i in ids[1:])]
        return [
            SimpleNamespace(
                prompt_token_ids=ids,
                prompt_logprobs=logprobs if params.prompt_logprobs is not None else None,
                num_cached_tokens=request["cached"],
            )
        ]

    def get_metrics(self) -> list[Any]:
        return [
            SimpleNamespace(name="vllm:num_requests_running", value=float(self.running)),
            SimpleNamespace(name="vllm:kv_cache_usage_perc", value=self.used / (self.pool - 1)),
        ]

    def reset_prefix_cache(self) -> None:
        self.resets += 1


class Recorder(Answers):
    """Takes the place of the pipe."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def send(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))


@pytest.fixture(autouse=True)
def _no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("vllm")
    fake.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)


@pytest.fixture
def job() -> ScoringJob:
    return ScoringJob(
        engine="full",
        model="m",
        dtype="bfloat16",
        token_ids=list(range(20)),
        lengths=[10, 20],
        chunk=8,
        decode_tokens=5,
        kv_cache_bytes=1,
    )


def test_scoring_reads_nll_time_and_blocks_of_every_chunk(job: ScoringJob) -> None:
    engine = ScoringEngine(ScriptedLLM(job, block=4), job)
    engine.warm_up()
    answers = Recorder()
    nll, steps = engine.score(answers)
    assert nll == [float(i) for i in range(1, 20)]
    assert [(s.tokens, s.kv_blocks) for s in steps] == [(8, 2), (16, 4), (20, 5)]
    assert steps[0].seconds < steps[1].seconds < steps[2].seconds
    assert [fields["done"] for _, fields in answers.events] == [8, 16, 20]


def test_warming_up_leaves_no_prefix_behind(job: ScoringJob) -> None:
    llm = ScriptedLLM(job, block=4)
    ScoringEngine(llm, job).warm_up()
    assert llm.resets == 1
    assert llm.request is None


def test_another_chunk_than_asked_for_is_an_error(job: ScoringJob) -> None:
    llm = ScriptedLLM(job, block=4, chunk=16)
    with pytest.raises(RuntimeError, match="did not take 8 tokens a step"):
        ScoringEngine(llm, job).score(Recorder())


def test_decoding_times_every_step_but_the_last(job: ScoringJob) -> None:
    engine = ScoringEngine(ScriptedLLM(job, block=4), job)
    run = engine.decode(10)
    assert len(run.step_ms) == job.decode_tokens - 2
    assert min(run.step_ms) >= 1
    assert run.cached_tokens == 8
    assert run.kv_blocks == 4  # 10 tokens of prompt and 3 of the generated ones


def test_figures_take_the_most_blocks_up_to_each_length() -> None:
    steps = [PrefillStep(8, 2.0, 6), PrefillStep(16, 4.0, 9), PrefillStep(20, 5.0, 5)]
    runs = [DecodeRun(10, [3.0, 1.0, 2.0], 4, 8), DecodeRun(20, [5.0], 4, 16)]
    first, second = length_figures([1.0] * 19, steps, runs)
    assert (first.kv_blocks, second.kv_blocks) == (6, 9)
    assert first.prefill_tokens_per_s == pytest.approx(10 / 2.5)
    assert first.decode_ms_per_token == 2.0
    assert second.nll == 1.0
