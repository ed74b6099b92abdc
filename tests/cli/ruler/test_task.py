"""What is hidden, what is expected, and how long prompts are."""

import re
from collections import Counter
from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_lminf.cli.retrieval.task import Tokenizer
from vllm_lminf.cli.ruler.task import (
    COMMON,
    FREQUENT,
    HOPS,
    TASK,
    TASKS,
    Cell,
    PromptBuilder,
    TaskName,
    cells_of,
    grade,
    question_of,
)


class Words:
    """A tokenizer of which each word is a token; it remembers how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self._words: list[str] = []

    def encode(self, text: str, **options: Any) -> list[int]:
        self.asked += 1
        self._words = text.split(" ")
        return list(range(len(self._words)))

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(self._words[n] for n in token_ids)


@pytest.fixture(scope="module")
def trained(model_path: str) -> Tokenizer:
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(model_path)
    return tokenizer


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1500, 4096, 20_000])
def test_prompts_fill_their_length(trained: Tokenizer, task: TaskName, length: int) -> None:
    """To a sentence, or to what one more word brings with it, and with room for the answer."""
    if task == "cwe" and length == 4096:
        length = 5000  # from 4096 tokens on its words come more often
    cell = Cell(length, task, 0, 0)
    tokens = PromptBuilder(trained).prompt(cell)
    left = length - TASK.answer_tokens(cell) - len(tokens)
    assert 0 <= left <= 40


def test_few_tokenisations_do() -> None:
    words = Words()
    PromptBuilder(words).prompt(Cell(100_000, "fwe", 0, 0))
    assert words.asked < 30


@pytest.mark.parametrize("task", TASKS)
def test_the_lead_stands_at_the_end(trained: Tokenizer, task: TaskName) -> None:
    """What is generated goes on with it: no blank, and no end of a sentence."""
    text = trained.decode(PromptBuilder(trained).prompt(Cell(3000, task, 1, 0)))
    assert re.search(r"\nAnswer: The [A-Za-z0-9 ]+ (is|are)$", text)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_expected_does_not_depend_on_the_text(task: TaskName) -> None:
    cell = Cell(2000, task, 3, 7)
    first, again = question_of(cell), question_of(cell)
    assert first.prompt(200) == again.prompt(200)
    first.prompt(1000)
    assert first.answers == again.answers
    assert first.prompt(200) == again.prompt(200)
    others = [Cell(2000, task, 4, 7), Cell(2000, task, 3, 8)]
    assert all(question_of(other).answers != again.answers for other in others)


def test_a_needle_is_there_once() -> None:
    question = question_of(Cell(2000, "niah_single_1", 0, 0))
    (number,) = question.answers
    assert len(number) == 7
    assert question.prompt(100).count(number) == 1
    assert len(re.findall(r"is \d{7}\.", question.prompt(100))) == 1


def test_needles_have_distractors() -> None:
    question = question_of(Cell(2000, "niah_multikey", 0, 0))
    text = question.prompt(100)
    needles = dict(re.findall(r"The magic number of (\w+) is (\d{7})\.", text))
    assert len(needles) == 4
    (asked,) = re.findall(r"What is the magic number of (\w+)\?", text)
    assert question.answers == [needles[asked]]


def test_a_chain_is_in_order() -> None:
    question = question_of(Cell(2000, "vt", 0, 0))
    _, asked = question.prompt(100).split("\n\n")
    lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", asked)
    assert [name for name, _ in lines] == question.answers
    assert len(lines) == HOPS + 1
    (value,) = re.findall(r"value (\d+), directly", asked)
    assert [source for _, source in lines] == [value, *question.answers[:-1]]


@pytest.mark.parametrize(("length", "common", "other"), [(2000, 10, 1), (4096, 30, 3)])
def test_common_words_come_most_often(length: int, common: int, other: int) -> None:
    question = question_of(Cell(length, "cwe", 0, 0))
    _, asked = question.prompt(50).split("\n\n")
    counts = Counter(asked.split("\n")[1].split())
    assert counts == Counter(
        {word: common if word in question.answers else other for word in counts}
    )
    assert (len(question.answers), len(counts)) == (COMMON, COMMON + 50)


@pytest.mark.parametrize("units", [100, 115, 1000, 20_000])
def test_frequent_words_are_the_most_frequent(units: int) -> None:
    question = question_of(Cell(2000, "fwe", 0, 0))
    counts = Counter(question.prompt(units).split("\n")[1].split())
    (dots, most), *others = counts.most_common()
    assert dots == "..."
    assert most > 2 * others[0][1]
    assert [word for word, _ in others[:FREQUENT]] == question.answers
    assert others[FREQUENT - 1][1] > others[FREQUENT][1]


def test_grades() -> None:
    cell = Cell(2000, "vt", 0, 0)
    names = question_of(cell).answers
    assert grade(", ".join(names), cell) == 1
    assert grade(f"{names[0].lower()} and {names[3]}", cell) == pytest.approx(2 / 5)
    assert grade("", cell) == 0


def test_cells_leave_others_what_they_were() -> None:
    few = list(cells_of([2000], ["vt"], 2, 0))
    more = list(cells_of([4000, 2000], ["cwe", "vt"], 3, 0))
    assert set(few) < set(more)
    assert [cell.length for cell in more] == [4000] * 6 + [2000] * 6


def test_no_room(trained: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"cwe takes [0-9]+ tokens at least: leave 500 out"):
        PromptBuilder(trained).prompt(Cell(500, "cwe", 0, 0))
