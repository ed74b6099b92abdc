"""`bench start`: what it refuses, what it starts in which order, and one start for real."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.engine.oracle_model import save_tiny_llama
from vllm_lminf.cli.bench import start_command
from vllm_lminf.cli.bench.start_job import StartJob
from vllm_lminf.cli.child import run_child
from vllm_lminf.cli.main import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path / "model"


def test_kinds_take_turns_and_caches_are_as_told(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The child is a recording: the second start of each kind takes a second longer."""
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "LMINF")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    asked: list[dict[str, str]] = []

    def answer(module: str, job: dict[str, Any], *, env: dict[str, str], **_: object) -> float:
        assert module == "vllm_lminf.cli.bench.start"
        asked.append(env)
        first = "empty" in env["XDG_CACHE_HOME"] and "VLLM_ATTENTION_BACKEND" in env
        return 10.0 + (len(asked) - 2) // 3 + 1.5 * first

    monkeypatch.setattr(start_command, "run_child", answer)
    output = tmp_path / "out"
    command = ["bench", "start", "--model", str(model), "--output", str(output), "--rounds", "2"]
    assert main(command) == 0
    selected = [env.get("VLLM_ATTENTION_BACKEND") for env in asked]
    assert selected == ["LMINF"] + [None, "LMINF", "LMINF"] * 2
    assert {env["VLLM_CACHE_ROOT"] for env in asked} == {"/cache/vllm"}
    warm, first = asked[2::3], asked[3::3]
    assert len({env["XDG_CACHE_HOME"] for env in [asked[0], *warm]}) == 1
    assert len({env["XDG_CACHE_HOME"] for env in first}) == 2
    data = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert data["result"]["seconds"] == {
        "vLLM alone": [10.0, 11.0],
        "LMINF": [10.0, 11.0],
        "LMINF, first start": [11.5, 12.5],
    }
    printed = " ".join(capsys.readouterr().out.split())
    assert "LMINF, first start 12.0 (11.8–12.2) 1.5 (1.5–1.5)" in printed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--rounds", "0"], "--rounds 0: it must be 1 or more"),
        (["--model", "nowhere"], "--model nowhere: no checkpoint there"),
    ],
)
def test_refusals(
    options: list[str],
    reason: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["bench", "start", "--model", str(model), "--output", str(tmp_path / "out"), *options]
    assert main(command) == 1
    assert reason in capsys.readouterr().err


@pytest.mark.engine
def test_one_start_for_real(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", 2, 1, 64)
    seconds = run_child(
        "vllm_lminf.cli.bench.start",
        asdict(StartJob(str(model), "float32")),
        env=start_command._environment("LMINF", tmp_path / "cache"),
        log_path=tmp_path / "log",
        on_event=lambda event: None,
    )
    assert 0 < seconds < 600
    assert "LMINF is active" in (tmp_path / "log").read_text(encoding="utf-8")
    assert list((tmp_path / "cache" / "vllm-lminf").glob("kernels-float32-*.so"))
