"""Results as the benchmarks' child processes would send them, for tests that run none."""

from pathlib import Path
from typing import Any

from vllm_lminf.cli.bench.engine_job import EngineJob, EngineResult, EngineRuns, PrefillRun
from vllm_lminf.cli.bench.kernel_job import (
    LMINF_ROTARY,
    N_GLOBALS,
    PARTS,
    VLLM_FULL,
    VLLM_ROTARY,
    VLLM_WINDOW,
    CaseResult,
    KernelJob,
    KernelResult,
    RotationResult,
    lminf,
    small_job,
)
from vllm_lminf.cli.scoring_job import ENGINE_NAMES, DecodeRun, EngineName, PrefillStep


def kernel_job() -> KernelJob:
    return small_job(window=200, length=700, rounds=2, threads=1, dtype="float32", chunk=130)


def kernel_result(job: KernelJob) -> KernelResult:
    """vLLM takes 1 and 2 ms; LMINF half of that without global tokens, and more with them."""
    cases = []
    for case in job.cases:
        seconds = {VLLM_WINDOW: [1e-3, 2e-3]}
        seconds |= {lminf(n): [(5 + n / 10) * 1e-4, (10 + n / 5) * 1e-4] for n in N_GLOBALS}
        if case.is_mixed:
            seconds |= {PARTS[0]: [1e-4, 2e-4], PARTS[1]: [3e-4, 4e-4]}
        else:
            seconds[VLLM_FULL] = [6e-3, 12e-3]
        figures = dict.fromkeys(seconds, 10**6)
        cases.append(
            CaseResult(case, dict.fromkeys(seconds, 1e-7), 1e-7, seconds, figures, figures)
        )
    rotations = [
        RotationResult(heads, n, {}, {VLLM_ROTARY: [1e-5, 1e-5], LMINF_ROTARY: [5e-6, 2e-5]})
        for heads in job.shapes
        for n in job.rotated_tokens
    ]
    return KernelResult(cases, rotations, "vec", 1)


def engine_job(model: Path, **changes: Any) -> EngineJob:
    arguments: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "text": None,
        "lengths": [100, 256, 512],
        "lminf_lengths": [1024],
        "chunk": 128,
        "rounds": 2,
        "decode_rounds": 2,
        "decode_tokens": 3,
        "lminf": {"n_local": 128},
    }
    return EngineJob(**(arguments | changes))


def engine_runs(name: EngineName, job: EngineJob) -> EngineRuns:
    """LMINF takes 1 s a chunk and 4 ms a token; full attention more of both with every chunk. In
    the second round everything takes twice as long."""
    prefill, decode = [], []
    for slower in range(1, job.rounds + 1):
        for tokens in job.prompts_of(name):
            steps: list[PrefillStep] = []
            for end in [*range(job.chunk, tokens, job.chunk), tokens]:
                seconds = steps[-1].seconds if steps else 0.0
                number = len(steps) + 1
                seconds += slower * (number if name == "full" else 1)
                steps.append(
                    PrefillStep(end, seconds, number if name == "full" else min(number, 3))
                )
            prefill.append(PrefillRun(tokens, steps))
        for length in job.lengths_of(name):
            ms = slower * (length / 64 if name == "full" else 4.0)
            blocks = 1 + length // 128 if name == "full" else 2
            decode.append(DecodeRun(length, [ms, ms, 9 * ms], blocks, length - 1))
    return EngineRuns(prefill, decode, 128, 1 << 20, 100, 1.5)


def engine_result(job: EngineJob) -> EngineResult:
    runs = {name: engine_runs(name, job) for name in ENGINE_NAMES}
    return EngineResult(runs, 1e-6, 256, 2, "cpu")
