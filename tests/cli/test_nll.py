"""The evaluation around its engines, which are replaced by recorded answers."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vllm_lminf.cli import engines, nll
from vllm_lminf.cli.child import Event
from vllm_lminf.cli.main import main
from vllm_lminf.cli.scoring_job import ScoringResult
from vllm_lminf.errors import CliError

Jobs = list[tuple[str, dict[str, Any], dict[str, str]]]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, sample_result: Callable[..., ScoringResult]) -> Jobs:
    """Answer every child process from a recording; return what each was asked."""
    asked: Jobs = []

    def run_child(
        module: str,
        job: dict[str, Any],
        *,
        env: dict[str, str],
        log_path: Path,
        on_event: Callable[[Event], None],
    ) -> Any:
        asked.append((module.rpartition(".")[2], job, env))
        if module.endswith("model_facts"):
            return {
                "trained_length": 8192,
                "kv_bytes_per_token": 100,
                "token_ids": list(range(20000)),
            }
        if job["model"].endswith("broken"):
            raise CliError("it ended with status -9")
        on_event({"event": "phase", "text": "scoring"})
        return asdict(sample_result(job["engine"], job["lengths"]))

    for module in (engines, nll):
        monkeypatch.setattr(module, "run_child", run_child)
    monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
    return asked


def arguments(folder: Path, *more: str, model: str = "model") -> list[str]:
    (folder / model).mkdir()
    (folder / model / "config.json").write_text("{}", encoding="utf-8")
    (folder / "text.txt").write_text("words", encoding="utf-8")
    return [
        *("eval", "nll", "--model", str(folder / model), "--text", str(folder / "text.txt")),
        *("--output", str(folder / "out"), *more),
    ]


@pytest.mark.usefixtures("jobs")
def test_everything_is_written_and_the_last_line_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main(arguments(tmp_path, "--n-global", "4")) == 0
    data = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert data["lengths"] == [2048, 4096, 8192, 12288, 16384]
    assert (tmp_path / "out/lminf.png").is_file()
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"VLLM_ATTENTION_BACKEND=LMINF vllm serve {tmp_path}/model --max")
    assert "n_global" in last


def test_each_engine_gets_its_own_environment_and_job(
    tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "LMINF")
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert main(arguments(tmp_path, "--n-local", "4096", "--lengths", "1024,16384")) == 0
    (_, _, facts_env), (_, full, full_env), (_, lminf, lminf_env) = jobs

    assert "VLLM_ATTENTION_BACKEND" not in facts_env
    assert "VLLM_ATTENTION_BACKEND" not in full_env
    assert lminf_env["VLLM_ATTENTION_BACKEND"] == "LMINF"
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in full_env
    assert full["hf_overrides"] == {"max_position_embeddings": 16400}
    assert full["lminf"] == {}
    assert lminf["hf_overrides"] == {}
    assert lminf["lminf"] == {"n_local": 4096}
    assert full["token_ids"] == lminf["token_ids"] == list(range(16384))
    assert full["kv_cache_bytes"] == lminf["kv_cache_bytes"] > 16400 * 100


def test_full_attention_is_not_stretched_inside_the_trained_length(
    tmp_path: Path, jobs: Jobs
) -> None:
    pytest.importorskip("matplotlib")
    assert main(arguments(tmp_path, "--lengths", "4096", "--engines", "full")) == 0
    assert [name for name, _, _ in jobs] == ["model_facts", "scoring"]
    assert jobs[1][1]["hf_overrides"] == {}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--engines", "full,sdpa"], "'sdpa' is not one of full, lminf"),
        (["--lengths", "4096,30000"], "the text has 20000 tokens, 30000 were asked for"),
        (["--n-local", "4096", "--distance-limit", "100"], "distance_limit is 100"),
    ],
)
def test_refusals_come_before_any_engine(
    tmp_path: Path,
    jobs: Jobs,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    reason: str,
) -> None:
    pytest.importorskip("matplotlib")
    assert main(arguments(tmp_path, *options)) == 1
    assert reason in capsys.readouterr().err
    assert "scoring" not in [name for name, _, _ in jobs]


@pytest.mark.usefixtures("jobs")
def test_a_failed_engine_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(arguments(tmp_path, model="broken")) == 1
    assert "the full attention engine stopped: it ended with status -9" in capsys.readouterr().err


def test_a_text_that_is_not_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(tmp_path)
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00")
    assert main(argv) == 1
    assert "not UTF-8" in capsys.readouterr().err


def test_the_plot_library_is_asked_for_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert main(arguments(tmp_path)) == 1
    assert "pip install 'matplotlib>=3.9,<4'" in capsys.readouterr().err
