"""The command around its systems, which are replaced by made-up answers."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllm_lminf.cli import engines
from vllm_lminf.cli.child import Event
from vllm_lminf.cli.main import main
from vllm_lminf.cli.passkey.task import TASK
from vllm_lminf.cli.retrieval import command
from vllm_lminf.cli.retrieval.report import Outcome, as_data, print_table, table_rows
from vllm_lminf.cli.retrieval.results import Share
from vllm_lminf.errors import CliError

pytest.importorskip("matplotlib")

Jobs = dict[str, tuple[dict[str, Any], dict[str, str]]]
"""What each system was asked last, and in which environment."""


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """LMINF loses what is at the beginning of the longer text; the window breaks down after two
    answers, full attention finds everything.
    """
    asked: Jobs = {}

    def run_child(
        module: str,
        job: dict[str, Any],
        *,
        env: dict[str, str],
        log_path: Path,
        on_event: Callable[[Event], None],
    ) -> Any:
        if module.endswith("model_facts"):
            return {"trained_length": 2048, "kv_bytes_per_token": 100, "token_ids": []}
        system = log_path.stem
        asked[system] = (job, env)
        on_event({"event": "phase", "text": "asking"})
        for number, (length, depth, key) in enumerate(job["cells"]):
            if system == "window" and number == 2:
                raise CliError("it ended with status -9")
            lost = system == "lminf" and length == 4096 and depth < 0.3
            text = " the grass" if lost else f" {key}. Re"
            on_event({"event": "answer", "cell": [length, depth, key], "text": text})
        return None

    for module in (engines, command):
        monkeypatch.setattr(module, "run_child", run_child)
    for name in list(os.environ):
        if name.startswith(("VLLM_ATTENTION_BACKEND", "VLLM_LMINF_")):
            monkeypatch.delenv(name)
    return asked


def arguments(folder: Path, *more: str) -> list[str]:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text("{}", encoding="utf-8")
    return [
        *("eval", "passkey", "--model", str(folder / "model"), "--output", str(folder / "out")),
        *("--lengths", "1024", "4096", "--depths", "3", "--keys", "2", *more),
    ]


def read_lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "out/answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.usefixtures("jobs")
def test_everything_is_written_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        *("LMINF 1024 6/6 1.000 0.610 to 1.000", "LMINF 4096 * 4/6 0.667"),
        *("full attention 4096 * 6/6", "* beyond the trained length of 2048", "3 depths, 2 keys"),
    ):
        assert words in shown
    for name in ("passkey-lminf.png", "passkey-full.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "out/passkey.json").read_text(encoding="utf-8"))
    assert data["command"].startswith("vllm-lminf eval passkey --model ")
    assert data["settings"]["full"]["dtype"] == "bfloat16"
    row = {"system": "lminf", "length": 4096, "depth": 0.1667, "found": 0, "asked": 2}
    assert any(row.items() <= cell.items() for cell in data["cells"])
    assert len(read_lines(tmp_path)) == 2 + 2 * 12


@pytest.mark.usefixtures("jobs")
def test_json_is_all_that_stands_on_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, "--json", "--systems", "full")) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["lengths"][1]["share"] == 1.0
    assert "Reading" in captured.err


def test_every_system_gets_its_own_engine(tmp_path: Path, jobs: Jobs) -> None:
    assert main(arguments(tmp_path, "--systems", "full,window,lminf", "--n-local", "512")) == 1
    full, window, lminf = (jobs[name][0] for name in ("full", "window", "lminf"))
    assert full["hf_overrides"] == {"max_position_embeddings": 4096}
    assert window["hf_overrides"] == {"max_position_embeddings": 4096, "sliding_window": 512}
    assert (lminf["hf_overrides"], lminf["lminf"]) == ({}, {"n_local": 512})
    assert full["lminf"] is window["lminf"] is None
    assert (full["window"], window["window"], lminf["window"]) == (None, 512, None)
    backends = {name: env.get("VLLM_ATTENTION_BACKEND") for name, (_, env) in jobs.items()}
    assert backends == {"full": None, "window": None, "lminf": "LMINF"}
    assert full["kv_cache_bytes"] >= 4 * 4096 * 100
    assert len(full["cells"]) == 12


def test_the_window_is_the_trained_length_by_default(tmp_path: Path, jobs: Jobs) -> None:
    main(arguments(tmp_path, "--systems", "window"))
    assert jobs["window"][0]["window"] == 2048


def test_settings_of_the_middle_are_for_the_middle(tmp_path: Path) -> None:
    settings = {"n_global": 4, "n_local": 512, "middle_top_k": 4, "middle_rows": 8}
    options = ["--n-local", "512", "--middle-top-k", "4"]
    given = ["--lminf", '{"n_global": 4, "middle_rows": 8}']
    args = command_arguments(arguments(tmp_path, *options, *given))
    assert command.lminf_settings(args) == settings
    assert command.settings_of("middle", settings) == settings
    assert command.settings_of("lminf", settings) == {"n_global": 4, "n_local": 512}
    assert command.settings_of("full", settings) is None


def command_arguments(argv: list[str]) -> Any:
    from vllm_lminf.cli.main import build_parser

    return build_parser().parse_args(argv)


def test_a_failed_system_is_named_and_the_others_go_on(
    tmp_path: Path, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, "--systems", "window,lminf")) == 1
    captured = capsys.readouterr()
    assert "sliding window failed: it ended with status -9" in captured.err
    assert "sliding window 4096 * 2/2" in " ".join(captured.out.split())
    assert "lminf" in jobs
    data = json.loads((tmp_path / "out/passkey.json").read_text(encoding="utf-8"))
    assert data["failures"] == {"window": "it ended with status -9"}


def test_a_run_goes_on_where_it_ended(
    tmp_path: Path, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(tmp_path, "--systems", "window")
    assert main(argv) == 1
    before = read_lines(tmp_path)
    first = [tuple(cell) for cell in jobs["window"][0]["cells"]]
    assert main(argv) == 1
    assert [tuple(cell) for cell in jobs["window"][0]["cells"]] == first[2:]
    assert read_lines(tmp_path)[: len(before)] == before
    jobs.clear()
    assert main(arguments(tmp_path, "--systems", "lminf")) == 0
    jobs.clear()
    capsys.readouterr()
    assert main(arguments(tmp_path, "--systems", "lminf")) == 0
    assert not jobs  # nothing is left to ask
    assert "LMINF 1024 6/6" in " ".join(capsys.readouterr().out.split())


def test_other_settings_in_the_same_folder_are_refused(
    tmp_path: Path, jobs: Jobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments(tmp_path)) == 0
    jobs.clear()
    for options, words in (
        (["--dtype", "float32"], "dtype was 'bfloat16' and is now 'float32'"),
        (["--n-local", "512"], "lminf: n_local was None and is now 512"),
    ):
        assert main(arguments(tmp_path, *options)) == 1
        errors = capsys.readouterr().err
        assert words in errors
        assert "Give another --output" in errors
    monkeypatch.setenv("VLLM_LMINF_N_GLOBAL", "4")
    assert main(arguments(tmp_path)) == 1
    assert "n_global was 10 and is now 4" in capsys.readouterr().err
    assert not jobs


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--systems", "lminf,sdpa"], "'sdpa' is not one of lminf, full, window, middle"),
        (["--systems", "server"], "'server' is not one of"),
        (["--systems", "middle"], "--systems middle and --middle-top-k N, such as 4"),
        (["--middle-top-k", "4"], "--systems middle and --middle-top-k N, such as 4"),
        (["--lminf", "{"], "it is not JSON"),
        (["--lminf", "[4]"], "it must be an object"),
        (["--lminf", '{"n_local": 4}', "--n-local", "4"], "n_local is given twice"),
        (["--lminf", '{"n_globl": 4}'], '"n_globl" in lminf is not a setting'),
        (["--lminf", '{"distance_limit": 100}'], "distance_limit is 100"),
        (["--keys", "0", "--depths", "0"], "--depths 0: it must be 1 or more\n--keys 0"),
        (["--max-num-seqs", "0"], "--max-num-seqs 0"),
        (["--lengths", "4k"], "--lengths 4k: give whole numbers"),
        (["--url", "http://x", "--n-local", "4"], "--n-local is not for --url"),
        (["--url", "http://x", "--systems", "full"], "--systems is not for --url"),
        (["--served-model", "m"], "--served-model is for --url alone"),
    ],
)
def test_refusals_come_before_any_engine(
    tmp_path: Path,
    jobs: Jobs,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    reason: str,
) -> None:
    assert main(arguments(tmp_path, *options)) == 1
    assert reason in capsys.readouterr().err
    assert not jobs


@pytest.mark.usefixtures("jobs")
def test_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(tmp_path)
    (tmp_path / "model/config.json").unlink()
    assert main(argv) == 1
    assert "no config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def outcome() -> Outcome:
    shares = {(1024, 0.0): Share(1, 2), (1024, 1.0): Share(2, 2), (2048, 0.0): Share(0, 2)}
    return Outcome(
        task=TASK,
        command="vllm-lminf eval passkey",
        model="some-model",
        trained_length=1024,
        settings={"lminf": {}},
        environment={},
        lengths=[1024, 2048, 4096],
        rows=[0.0, 1.0],
        count=2,
        shares={"lminf": shares},
        failures={"lminf": "it ended"},
    )


def test_the_table_sums_over_depths(outcome: Outcome) -> None:
    assert table_rows(outcome) == [
        ["LMINF", "1024  ", "3/4", "0.750", "0.301 to 0.954"],
        ["LMINF", "2048 *", "0/2", "0.000", "0.000 to 0.658"],
        ["LMINF", "4096 *", "-", "-", "-"],
    ]


def test_the_printed_table_explains_itself(outcome: Outcome) -> None:
    out = io.StringIO()
    print_table(Console(file=out, width=140), outcome)
    text = " ".join(out.getvalue().split())
    for words in (
        "Passkeys found by some-model",
        "95% interval",
        "Wilson",
        "first five digits in a row",
    ):
        assert words in text


def test_what_was_not_answered_is_not_in_the_figures(outcome: Outcome) -> None:
    data = json.loads(json.dumps(as_data(outcome)))
    assert [row["length"] for row in data["lengths"]] == [1024, 2048]
    assert data["lengths"][0]["interval_95"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert len(data["cells"]) == 3
