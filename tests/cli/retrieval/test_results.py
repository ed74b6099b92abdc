"""How sure a share is, and a file of answers from which a run goes on."""

import json
from pathlib import Path

import pytest

from vllm_lminf.cli.passkey.task import TASK, Cell
from vllm_lminf.cli.retrieval.results import AnswersFile, Share
from vllm_lminf.errors import CliError

CELLS = [Cell(1024, 0.5, "12345"), Cell(1024, 1.0, "54321")]
MODEL = {"lminf": {"model": "m", "n_local": 64}}


@pytest.mark.parametrize(
    ("found", "asked", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (15, 148, 0.0624, 0.1605),  # Newcombe 1998, table I, method 3: 0.0624 to 0.1605
        (81, 263, 0.2553, 0.3662),  # and 0.2553 to 0.3662
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilsons_interval(found: int, asked: int, low: float, high: float) -> None:
    assert Share(found, asked).interval == pytest.approx((low, high), abs=5e-5)


def test_answers_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answers = AnswersFile(TASK, path, MODEL)
    assert answers.pending("lminf", CELLS) == CELLS
    answers.add("lminf", CELLS[0], " 12345.")
    again = AnswersFile(TASK, path, MODEL)
    assert again.pending("lminf", CELLS) == CELLS[1:]
    assert again.share("lminf", CELLS) == Share(1, 1)
    again.add("lminf", CELLS[1], " none")
    assert AnswersFile(TASK, path, MODEL).share("lminf", CELLS) == Share(1, 2)


def test_each_line_is_readable_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswersFile(TASK, path, MODEL).add("lminf", CELLS[0], " 12345.")
    first, second = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert first == {"system": "lminf", "depends_on": MODEL["lminf"]}
    assert second == {
        "system": "lminf",
        "length": 1024,
        "depth": 0.5,
        "key": "12345",
        "answer": " 12345.",
        "found": True,
    }


def test_another_system_joins(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswersFile(TASK, path, MODEL).add("lminf", CELLS[0], " 12345.")
    both = AnswersFile(TASK, path, {**MODEL, "full": {"model": "m"}})
    assert both.pending("full", CELLS) == CELLS
    assert AnswersFile(TASK, path, {"full": {"model": "m"}}).pending("lminf", CELLS) == CELLS[1:]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswersFile(TASK, path, MODEL)
    other = {"lminf": {"model": "m", "n_local": 128}}
    with pytest.raises(CliError, match="lminf: n_local was 64 and is now 128"):
        AnswersFile(TASK, path, other)
    with pytest.raises(CliError, match="model was 'm' and is now 'other'"):
        AnswersFile(TASK, path, {"lminf": {**MODEL["lminf"], "model": "other"}})


def test_half_a_line_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswersFile(TASK, path, MODEL).add("lminf", CELLS[0], " 12345.")
    with path.open("a", encoding="utf-8") as lines:
        lines.write('{"system": "lminf", "len')
    again = AnswersFile(TASK, path, MODEL)
    again.add("lminf", CELLS[1], " 54321.")
    assert AnswersFile(TASK, path, MODEL).share("lminf", CELLS) == Share(2, 2)


@pytest.mark.parametrize("text", ["words\n", "{}\n", "[1]\n"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CliError, match=r"no file of answers.*another --output"):
        AnswersFile(TASK, path, MODEL)
    assert path.read_text(encoding="utf-8") == text
