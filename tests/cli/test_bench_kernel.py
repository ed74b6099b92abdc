"""`bench kernel`: what it refuses, what it prints, and that a wrong kernel is never timed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.cli.made_up import kernel_job, kernel_result
from vllm_lminf.cli.bench import running
from vllm_lminf.cli.bench.kernel_job import (
    LMINF_ROTARY,
    Case,
    Heads,
    KernelJob,
    KernelResult,
    lminf,
)
from vllm_lminf.cli.bench.kernel_report import kernel_tables, ratio_table
from vllm_lminf.cli.bench.turns import TRIALS, time_in_turns
from vllm_lminf.cli.main import build_parser, main


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Answer the child process from a recording; return what it was asked."""
    asked: list[dict[str, Any]] = []

    def run_child(module: str, job: dict[str, Any], **_: object) -> Any:
        asked.append({"module": module, **job})
        return asdict(kernel_result(KernelJob.from_json(job)))

    monkeypatch.setattr(running, "run_child", run_child)
    return asked


def test_everything_is_written(
    tmp_path: Path, recorded: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["bench", "kernel", "--output", str(tmp_path / "out"), "--rounds", "2"]) == 0
    (asked,) = recorded
    assert asked["module"] == "vllm_lminf.cli.bench.kernel"
    assert (asked["window"], asked["length"], asked["rounds"]) == (2048, 32768, 2)
    assert [case["heads"] for case in asked["cases"][::4]] == [(9, 3, 64), (32, 8, 128)]
    data = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert data["result"]["cases"][0]["seconds"][lminf(10)] == pytest.approx([6e-4, 12e-4])
    assert data["versions"]["python"].startswith("3.")
    assert data["machine"]["cores"] >= 1
    assert (tmp_path / "out/bench-kernel.png").read_bytes().startswith(b"\x89PNG")
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("32/8/128", "8 × 1, 1 × 2048", "0.60 (0.60–0.60)", "variant 'vec'"):
        assert words in printed
    assert "…" not in printed  # nothing is cut off in 80 columns


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--length", "4000"], "--length 4000: it must be 4196 or more"),
        (["--rounds", "0", "--threads", "-1"], "--threads -1: it must be 1 or more"),
        (["--window", "0"], "--window 0: it must be 1 or more"),
    ],
)
def test_refusals(
    tmp_path: Path,
    recorded: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    reason: str,
) -> None:
    assert main(["bench", "kernel", "--output", str(tmp_path / "out"), *options]) == 1
    assert reason in capsys.readouterr().err
    assert not recorded
    assert not (tmp_path / "out").exists()


def test_a_benchmark_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["bench"])
    assert "BENCHMARK" in capsys.readouterr().err


def test_ratios_are_of_each_round() -> None:
    job = kernel_job()
    result = kernel_result(job)
    row = ratio_table(job, result.cases).rows[0]
    assert row == ("4/2/64", "1 × 1", *(f"{r} ({r}–{r})" for r in ("0.50", "0.60", "1.50")))
    mixed, rotation = kernel_tables(job, result)[2:]
    assert mixed.rows[0][1:] == ("3 × 1, 1 × 130", "0.150", "0.350", "0.900", "1.75 (1.63–1.88)")
    assert rotation.rows[0] == ("4/2/64", "1", "10.0", "12.5", "1.25 (0.88–1.62)")


def test_results_survive_json() -> None:
    job = kernel_job()
    result = kernel_result(job)
    assert KernelJob.from_json(json.loads(json.dumps(asdict(job)))) == job
    assert KernelResult.from_json(json.loads(json.dumps(asdict(result)))) == result


def test_everyone_has_a_turn_and_nobody_is_always_first() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    steps: list[int] = []
    seconds = time_in_turns(runs, 4, 0.0, lambda: steps.append(len(calls)))
    tried = TRIALS * len(runs)
    assert calls[tried:] == list("abcbcacababc")
    assert steps == [tried + 3, tried + 6, tried + 9, tried + 12]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


@pytest.mark.engine
def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose window is a token short; next to the oracle and, without global tokens, to vLLM."""
    from vllm_lminf.cli.bench import kernel
    from vllm_lminf.pattern import LambdaPattern

    timed: list[object] = []
    right = kernel.lminf_contender

    def one_short(batch: kernel.Batch, pattern: LambdaPattern) -> kernel.Contender:
        wrong = LambdaPattern(pattern.n_global, pattern.n_local - 1, pattern.distance_limit)
        contender = right(batch, wrong)
        return kernel.Contender(pattern, contender.run, contender.output)

    kernel.current_platform.import_kernels()
    monkeypatch.setattr(kernel, "time_in_turns", lambda *args: timed.append(args) or {})
    job = kernel_job()
    case = Case(Heads(4, 2, 64), decodes=3)
    sequences = kernel.Sequences(case.heads, 3, job)
    assert kernel.measure_case(case, sequences, job, lambda: None).agreement < 1e-6
    assert len(timed) == 1
    monkeypatch.setattr(kernel, "lminf_contender", one_short)
    with pytest.raises(kernel.CheckError, match=r"4/2/64, 3 × 1: LMINF, n_global 0 is off by 0\."):
        kernel.measure_case(case, sequences, job, lambda: None)
    assert len(timed) == 1


@pytest.mark.engine
def test_figures_of_a_batch() -> None:
    """Bytes and operations, counted pair by pair."""
    from vllm_lminf.cli.bench import kernel
    from vllm_lminf.pattern import LambdaPattern

    kernel.current_platform.import_kernels()
    job = kernel_job()
    sequences = kernel.Sequences(Heads(4, 2, 64), 2, job)
    batch = kernel.Batch(Case(sequences.heads, decodes=1, prefill=20), sequences)
    pattern = LambdaPattern(10, 30, 30)
    seen = [
        {j for j in range(700) for i in queries if pattern.visible(i, j)}
        for queries in ([699], range(680, 700))
    ]
    assert batch.kv_bytes(pattern) == sum(map(len, seen)) * 2 * 2 * 64 * 4
    pairs = sum(pattern.visible(i, j) for i in batch.positions.tolist() for j in range(700))
    assert batch.flops(pattern) == 4 * pairs * 4 * 64


@pytest.mark.engine
def test_small_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "out"
    assert main(["bench", "kernel", "--small", "--threads", "1", "--output", str(output)]) == 0
    data = json.loads((output / "results.json").read_text(encoding="utf-8"))
    job, result = KernelJob.from_json(data["job"]), KernelResult.from_json(data["result"])
    assert [case.case for case in result.cases] == job.cases
    for case in result.cases:
        assert max(*case.errors.values(), case.agreement) < 8e-3
        assert all(len(s) == job.rounds and min(s) > 0 for s in case.seconds.values())
    assert all(r.errors[LMINF_ROTARY] < 4e-3 for r in result.rotations)
    assert (output / "bench-kernel.png").is_file()
    printed = capsys.readouterr().out
    assert "bench kernel: done" in printed
    assert "3/1/32" in printed
