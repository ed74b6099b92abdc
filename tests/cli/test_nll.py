"""The evaluation around its engines, which are replaced by recorded answers."""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


def test_a_run_goes_on_where_it_ended(
    tmp_path: Path, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    argv = arguments(tmp_path)
    assert main([*argv, "--engines", "full"]) == 0
    jobs.clear()
    capsys.readouterr()
    assert main(argv) == 0
    assert [(name, job.get("engine")) for name, job, _ in jobs] == [
        ("model_facts", None),
        ("scoring", "lminf"),
    ]
    shown = capsys.readouterr().out
    assert f"Measured before: {tmp_path}/out/full.json; to measure again" in shown
    assert f"{tmp_path}/out/lminf.json" not in shown
    jobs.clear()
    assert main([*argv, "--n-global", "4", "--json"]) == 0
    assert [job.get("engine") for _, job, _ in jobs] == [None, "lminf"]
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert list(data["results"]) == ["full", "lminf"]


def test_a_file_that_is_none_of_ours_is_measured_over(tmp_path: Path, jobs: Jobs) -> None:
    pytest.importorskip("matplotlib")
    argv = arguments(tmp_path, "--engines", "full")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/full.json").write_text("[]")
    assert main(argv) == 0
    assert len(jobs) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--url", "http://x", "--n-local", "4"], "--n-local is not for --url"),
        (["--url", "http://x", "--engines", "full"], "--engines is not for --url"),
        (["--served-model", "m"], "--served-model is for --url alone"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert main(arguments(tmp_path, *options)) == 1
    assert reason in capsys.readouterr().err


class Scores(BaseHTTPRequestHandler):
    """Gives each token its number's thousandth as its log-probability, negated."""

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "one"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (body["model"], body["echo"], body["max_tokens"]) == ("one", True, 1)
        found = [None, *(-token / 1000 for token in body["prompt"][1:]), -9.0]
        self.reply({"choices": [{"logprobs": {"token_logprobs": found}}]})

    def reply(self, data: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def log_message(self, *words: Any) -> None:
        """Says nothing."""


def test_a_server_scores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sample_result: Callable[..., ScoringResult],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The child is real, and the text is token n at place n."""
    pytest.importorskip("matplotlib")
    facts = {"trained_length": 64, "kv_bytes_per_token": 100, "token_ids": list(range(300))}
    monkeypatch.setattr(engines, "run_child", lambda *args, **kwargs: facts)
    with ThreadingHTTPServer(("127.0.0.1", 0), Scores) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{listening.server_address[1]}"
        status = main(arguments(tmp_path, "--url", url, "--lengths", "64,256"))
        listening.shutdown()
        thread.join()
    assert status == 0
    data = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    short, long = data["results"]["server"]["figures"]
    assert short["nll"] == pytest.approx(0.0475)  # of the tokens 32 to 63
    assert long["nll"] == pytest.approx(0.1915)
    assert long["kv_blocks"] is None
    shown = capsys.readouterr().out
    assert "256 *" in shown
    assert "vllm serve" not in shown
    assert (tmp_path / "out/lminf.png").read_bytes().startswith(b"\x89PNG")


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
