"""Results as an engine would send them, for tests that need no engine."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_lminf.cli.report import Evaluation
from vllm_lminf.cli.scoring_job import (
    ENGINE_NAMES,
    DecodeRun,
    EngineName,
    LengthFigures,
    PrefillStep,
    ScoringResult,
)


def result_of(engine: EngineName, lengths: list[int]) -> ScoringResult:
    """Return a result whose figures grow with length for full attention and stay for LMINF."""
    grows = engine == "full"
    return ScoringResult(
        engine=engine,
        figures=[
            LengthFigures(
                length=length,
                nll=3.0 + (length / 8192 if grows else 0.0),
                prefill_tokens_per_s=1e6 / length if grows else 500.0,
                decode_ms_per_token=length / 100 if grows else 40.0,
                kv_blocks=length // 128 if grows else 67,
            )
            for length in lengths
        ],
        nll_curve=[3.0] * (lengths[-1] // 256),
        prefill_steps=[PrefillStep(length, length / 500, 10) for length in lengths],
        decode_runs=[DecodeRun(length, [40.0, 41.0], 10, length - 128) for length in lengths],
        block_size=128,
        pool_blocks=300,
        eager=True,
        start_seconds=20.0,
        scoring_seconds=60.0,
        total_seconds=90.0,
        torch_threads=2,
        device="cpu",
    )


def evaluation_of(folder: Path, engines: tuple[EngineName, ...]) -> Evaluation:
    """Return an evaluation at two trained and two untrained lengths."""
    lengths = [4096, 8192, 12288, 16384]
    return Evaluation(
        model=str(folder / "model"),
        text=str(folder / "text.txt"),
        text_tokens=20000,
        trained_length=8192,
        lengths=lengths,
        settings={"lminf": {}, "dtype": "bfloat16", "chunk": 2048, "decode_tokens": 16},
        environment={},
        results={engine: result_of(engine, lengths) for engine in engines},
    )


@pytest.fixture
def sample_result() -> Callable[[EngineName, list[int]], ScoringResult]:
    """Make a result out of an engine's name and its lengths."""
    return result_of


@pytest.fixture
def sample_evaluation(tmp_path: Path) -> Callable[..., Evaluation]:
    """Make an evaluation, of both engines or of those named."""

    def make(*engines: EngineName) -> Evaluation:
        return evaluation_of(tmp_path, engines or ENGINE_NAMES)

    return make
