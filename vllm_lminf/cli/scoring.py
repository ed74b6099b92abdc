"""The child process of ``vllm-lminf eval nll``: one real vLLM engine scores one text.

1. Warm-up: one chunk of the text backwards, scored and decoded for a few tokens, so that neither
   compilation nor the first touch of memory is timed. The prefix cache is emptied afterwards.
2. Scoring: one request holds the whole text and asks for the log-probability of every token. The
   engine takes ``chunk`` tokens a step, so the time of each step gives the time to prefill any
   length. A request with prompt log-probabilities never reads the prefix cache (vLLM sets
   ``skip_reading_prefix_cache`` for it), so every token is really computed; its blocks are
   cached all the same.
3. Decoding: for each length, a request with that many tokens finds its prompt in the prefix cache
   and generates greedily.

Blocks in use come from vLLM's own gauge ``vllm:kv_cache_usage_perc``, which is
``1 - free / (blocks - 1)`` (one block is vLLM's null block), so rounding gives the exact count.
Blocks that are only kept for the prefix cache count as free. The gauge is read while the request
still runs: a finished request holds nothing.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from vllm_lminf.cli.child import Answers, serve_job
from vllm_lminf.cli.engines import start_engine
from vllm_lminf.cli.scoring_job import (
    DecodeRun,
    LengthFigures,
    PrefillStep,
    ScoringJob,
    ScoringResult,
    nll_at,
    nll_curve,
    seconds_to_reach,
)

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

WARM_UP_DECODE_TOKENS = 8


class ScoringEngine:
    """A vLLM engine that is stepped by hand, one request at a time."""

    def __init__(self, llm: LLM, job: ScoringJob) -> None:
        self.llm = llm
        self.job = job
        self.engine = llm.llm_engine
        cache_config = self.engine.vllm_config.cache_config
        self.block_size: int = cache_config.block_size
        self.pool_blocks: int = cache_config.num_gpu_blocks or 0

    def gauge(self, name: str) -> float:
        """Return the value of one of vLLM's gauges as of the last step."""
        return next(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    def kv_blocks_in_use(self) -> int:
        """Return how many KV blocks running requests held after the last step."""
        return round(self.gauge("vllm:kv_cache_usage_perc") * (self.pool_blocks - 1))

    def add(self, name: str, token_ids: list[int], max_tokens: int, *, score: bool) -> None:
        """Queue one greedy request for exactly ``max_tokens`` tokens."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=0 if score else None,
        )
        self.engine.add_request(name, {"prompt_token_ids": token_ids}, params)

    def warm_up(self) -> None:
        """Run every kind of step once and forget the outcome."""
        self.add(
            "warm-up", self.job.token_ids[: self.job.chunk][::-1], WARM_UP_DECODE_TOKENS, score=True
        )
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.llm.reset_prefix_cache()

    def score(self, answers: Answers) -> tuple[list[float], list[PrefillStep]]:
        """Score the text; return the NLL of every token but the first, and the prefill steps."""
        token_ids = self.job.token_ids
        # A second token keeps the request, and so its blocks, alive after the last chunk.
        self.add("score", token_ids, max_tokens=2, score=True)
        steps: list[PrefillStep] = []
        nll: list[float] = []
        start = time.perf_counter()
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            seconds = time.perf_counter() - start
            if not outputs and not self.gauge("vllm:num_requests_running"):
                continue  # the engine only tidied up after the request before
            done = min((len(steps) + 1) * self.job.chunk, len(token_ids))
            if not steps or steps[-1].tokens < len(token_ids):
                steps.append(PrefillStep(done, seconds, self.kv_blocks_in_use()))
                answers.send("progress", done=done)
                if bool(outputs) != (done == len(token_ids)):
                    raise RuntimeError(
                        f"the engine did not take {self.job.chunk} tokens a step: "
                        f"step {len(steps)} of {len(token_ids)} tokens"
                    )
            if outputs and not nll:
                nll = prompt_nll(outputs[0])
        return nll, steps

    def decode(self, length: int) -> DecodeRun:
        """Generate after the first ``length`` tokens."""
        tokens = self.job.decode_tokens
        self.add(f"decode-{length}", self.job.token_ids[:length], tokens, score=False)
        stamps: list[float] = []
        blocks = 0
        cached = 0
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            if not outputs:
                continue
            stamps.append(time.perf_counter())
            cached = outputs[0].num_cached_tokens or 0
            if len(stamps) == tokens - 1:
                blocks = self.kv_blocks_in_use()
        # The engine works on while the gauge is read, which takes longer than a fast step: the
        # step that follows it is left out.
        timed = stamps[: tokens - 1] if tokens > 2 else stamps
        step_ms = [1000 * (b - a) for a, b in itertools.pairwise(timed)]
        return DecodeRun(length, step_ms, blocks, cached)


def prompt_nll(output: RequestOutput) -> list[float]:
    """Return the NLL, in nats, of every prompt token after the first."""
    token_ids, logprobs = output.prompt_token_ids, output.prompt_logprobs
    if token_ids is None or logprobs is None:
        raise RuntimeError("vLLM returned no prompt log-probabilities")
    nll = []
    for token_id, choices in zip(token_ids[1:], logprobs[1:], strict=True):
        if choices is None:
            raise RuntimeError("vLLM left out a prompt log-probability")
        nll.append(-choices[token_id].logprob)
    return nll


def length_figures(
    nll: list[float], steps: list[PrefillStep], runs: list[DecodeRun]
) -> list[LengthFigures]:
    """Reduce the raw measurements to one row per length."""
    return [
        LengthFigures(
            length=run.length,
            nll=nll_at(nll, run.length),
            prefill_tokens_per_s=run.length / seconds_to_reach(steps, run.length),
            decode_ms_per_token=statistics.median(run.step_ms),
            kv_blocks=max([run.kv_blocks, *(s.kv_blocks for s in steps if s.tokens <= run.length)]),
        )
        for run in runs
    ]


def worker_threads(worker: object) -> int:
    """Return how many threads torch computes with; runs in the engine's worker process."""
    import torch

    return torch.get_num_threads()


def main() -> None:
    """Read a ``ScoringJob`` from stdin and answer with a ``ScoringResult``."""
    # vLLM sends a function to its workers only with this; no one else talks to this engine.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    with serve_job() as (data, answers):
        job = ScoringJob(**data)
        begin = time.perf_counter()
        answers.send("phase", text="starting")
        llm = start_engine(
            model=job.model,
            dtype=job.dtype,
            max_model_len=max(job.lengths) + job.decode_tokens,
            max_num_batched_tokens=job.chunk,
            max_num_seqs=1,
            kv_cache_memory_bytes=job.kv_cache_bytes,
            async_scheduling=False,  # one step, one chunk
            disable_log_stats=False,
            compile=job.compile,
            hf_overrides=job.hf_overrides,
            lminf=job.lminf if job.engine == "lminf" else None,
        )
        engine = ScoringEngine(llm, job)
        answers.send("phase", text="warming up")
        engine.warm_up()
        started = time.perf_counter()
        answers.send("phase", text="scoring")
        nll, steps = engine.score(answers)
        scored = time.perf_counter()
        runs = []
        for length in job.lengths:
            answers.send("phase", text=f"decoding after {length}")
            runs.append(engine.decode(length))

        from vllm.platforms import current_platform

        result = ScoringResult(
            engine=job.engine,
            figures=length_figures(nll, steps, runs),
            nll_curve=nll_curve(nll),
            prefill_steps=steps,
            decode_runs=runs,
            block_size=engine.block_size,
            pool_blocks=engine.pool_blocks,
            eager=engine.engine.model_config.enforce_eager,
            start_seconds=started - begin,
            scoring_seconds=scored - started,
            total_seconds=time.perf_counter() - begin,
            torch_threads=engine.llm.collective_rpc(worker_threads)[0],
            device=current_platform.get_device_name(),
        )
        answers.send("result", result=asdict(result))


if __name__ == "__main__":
    main()
