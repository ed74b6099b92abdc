"""The command, with a made-up system; the rest of it is tested in tests/cli/retrieval."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_lminf.cli import engines
from vllm_lminf.cli.child import Event
from vllm_lminf.cli.main import main
from vllm_lminf.cli.retrieval import command
from vllm_lminf.cli.ruler.task import Cell, question_of

pytest.importorskip("matplotlib")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The questions, of which half of what is expected is answered, and nothing beyond 2000
    tokens."""
    cells: list[list[Any]] = []

    def run_child(
        module: str, job: dict[str, Any], *, on_event: Callable[[Event], None], **others: Any
    ) -> Any:
        if module.endswith("model_facts"):
            return {"trained_length": 2048, "kv_bytes_per_token": 100, "token_ids": []}
        assert (module, job["task"]) == ("vllm_lminf.cli.retrieval.asking", "ruler")
        for words in job["cells"]:
            cells.append(words)
            answers = question_of(Cell(*words)).answers
            text = ", ".join(answers[: (len(answers) + 1) // 2]) if words[0] <= 2000 else ""
            on_event({"event": "answer", "cell": json.loads(json.dumps(words)), "text": text})
        return None

    for module in (engines, command):
        monkeypatch.setattr(module, "run_child", run_child)
    return cells


def arguments(folder: Path, *more: str) -> list[str]:
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return [
        *("eval", "ruler", "--model", str(folder), "--output", str(folder / "out")),
        *("--lengths", "2000", "4000", "--samples", "2", "--systems", "lminf", *more),
    ]


def test_tasks_are_columns(
    asked: list[list[Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(arguments(tmp_path)) == 0
    assert len(asked) == 2 * 5 * 2
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "niah niah system length single_1 multikey vt cwe fwe found share 95% interval",
        "LMINF 2000 1.00 1.00 0.60 0.50 0.67 7.533/10 0.753",
        "LMINF 4000 * 0.00 0.00 0.00 0.00 0.00 0/10 0.000",
        "5 tasks, 2 samples each",
    ):
        assert words in shown
    assert (tmp_path / "out/ruler-lminf.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "out/ruler.json").read_text(encoding="utf-8"))
    assert data["samples"] == 2
    cell = next(c for c in data["cells"] if (c["task"], c["length"]) == ("cwe", 2000))
    assert (cell["found"], cell["share"]) == (1.0, 0.5)


def test_it_goes_on(asked: list[list[Any]], tmp_path: Path) -> None:
    assert main(arguments(tmp_path, "--tasks", "vt,fwe")) == 0
    assert {task for _, task, _, _ in asked} == {"vt", "fwe"}
    asked.clear()
    assert main(arguments(tmp_path, "--tasks", "vt,cwe", "--samples", "3")) == 0
    assert sorted(map(tuple, asked)) == sorted(
        [(n, "cwe", k, 0) for n in (2000, 4000) for k in range(3)]
        + [(n, "vt", 2, 0) for n in (2000, 4000)]
    )


def test_another_task_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path, "--tasks", "qa")) == 1
    assert "'qa' is not one of niah_single_1" in capsys.readouterr().err
