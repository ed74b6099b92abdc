"""Synthetic tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654) that need no data, after the
paper's description, in words of our own: figures compare systems here, and not with its tables.

No model, no engine and no file here.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal, get_args

from vllm_lminf.cli.passkey.task import FILLER
from vllm_lminf.cli.retrieval.task import Task, Tokenizer

TaskName = Literal["niah_single_1", "niah_multikey", "vt", "cwe", "fwe"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)

RULE = (
    "the share of the expected words or numbers that stand in what is generated, in upper or lower "
    "case"
)

NEEDLES = 4
"""Of niah_multikey: one is asked for, the others distract."""

HOPS = 4
"""Of vt: so many variables get their value from the one before."""

COMMON = 10
"""Of cwe: so many words come more often than the others."""

COMMON_REPEATS, OTHER_REPEATS = 30, 3
SHORT_COMMON_REPEATS, SHORT_OTHER_REPEATS = 10, 1
SHORT = 4096
"""Below so many tokens the words of cwe come less often."""

ZIPF = 2.0
"""Of fwe: the word of rank r comes in proportion to r to the power of minus this."""

FREQUENT = 3
"""Of fwe: so many words are asked for."""


@dataclass(frozen=True)
class Cell:
    """One question.

    Attributes:
        length: tokens of the prompt and the answer together, at most.
        task: which task.
        number: of the question, among those of its length and task.
        seed: of what is hidden.
    """

    length: int
    task: TaskName
    number: int
    seed: int


def cells_of(
    lengths: Sequence[int], tasks: Sequence[TaskName], samples: int, seed: int
) -> Iterator[Cell]:
    """Yield ``samples`` questions for each length and task, the longest first."""
    for length in sorted(lengths, reverse=True):
        for task in tasks:
            for number in range(samples):
                yield Cell(length, task, number, seed)


class Question(ABC):
    """One question: what is hidden, which follows from its cell alone, in a text of any size.

    Attributes:
        answer_tokens: how many tokens are generated.
        least: units of the smallest text.
        answers: what is expected.
    """

    answer_tokens: ClassVar[int]
    least: ClassVar[int] = 0
    answers: list[str]

    @abstractmethod
    def __init__(self, cell: Cell, rng: random.Random) -> None: ...

    @abstractmethod
    def prompt(self, units: int) -> str:
        """Return the prompt around a text of so many units: sentences or words."""


def _words(rng: random.Random, syllables: int = 3) -> Iterator[str]:
    """Words that are in no dictionary, none of them twice."""
    seen: set[str] = set()
    while True:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))
        word += rng.choice("lmnrst")
        if word not in seen:
            seen.add(word)
            yield word


def _among(filler: Sequence[str], hidden: Sequence[str], places: Sequence[float]) -> str:
    """Put sentences into others, each at its place, from 0 to 1."""
    parts = list(filler)
    for sentence, place in sorted(
        zip(hidden, places, strict=True), key=lambda each: each[1], reverse=True
    ):
        parts.insert(round(place * len(filler)), sentence)
    return " ".join(parts)


def _noise(sentences: int) -> list[str]:
    return [FILLER[n % len(FILLER)] for n in range(sentences)]


class Needles(Question):
    """Numbers that belong to words, in noise; one is asked for."""

    answer_tokens = 32
    count = 1

    def __init__(self, cell: Cell, rng: random.Random) -> None:
        words = list(islice(_words(rng), self.count))
        numbers = [str(rng.randint(10**6, 10**7 - 1)) for _ in words]
        self._needles = [
            f"The magic number of {word} is {number}."
            for word, number in zip(words, numbers, strict=True)
        ]
        self._places = [rng.random() for _ in words]
        asked = rng.randrange(len(words))
        self._word, self.answers = words[asked], [numbers[asked]]

    def prompt(self, units: int) -> str:
        return (
            "Magic numbers are hidden in the following text. Remember them: you will be asked for "
            f"one.\n{_among(_noise(units), self._needles, self._places)}\n"
            f"Question: What is the magic number of {self._word}?\n"
            f"Answer: The magic number of {self._word} is"
        )


class ManyNeedles(Needles):
    """The same with others beside it."""

    count = NEEDLES


class Variables(Question):
    """A chain of assignments in noise, in order; asked for are all variables that end up with the
    value. An example with its answer stands before it."""

    answer_tokens = 60

    def __init__(self, cell: Cell, rng: random.Random) -> None:
        self._example = self._chain(rng)
        self._value, self.answers, self._lines = self._chain(rng)
        self._places = sorted(rng.random() for _ in self._lines)

    @staticmethod
    def _chain(rng: random.Random) -> tuple[str, list[str], list[str]]:
        """A value, the variables that have it, and the assignments."""
        value = str(rng.randint(10000, 99999))
        names = ["".join(rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 5)) for _ in range(HOPS + 1)]
        sources = [value, *(f"VAR {name}" for name in names)]
        lines = [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=False)]
        return value, names, lines

    @staticmethod
    def _asked(text: str, value: str) -> str:
        return (
            "Assignments of variables are hidden in the following text. Follow them.\n"
            f"{text}\nQuestion: Which {HOPS + 1} variables have the value {value}, directly or "
            f"through others?\nAnswer: The variables with the value {value} are"
        )

    def prompt(self, units: int) -> str:
        value, names, lines = self._example
        even = [(n + 0.5) / len(lines) for n in range(len(lines))]
        shown = self._asked(_among(_noise(len(FILLER)), lines, even), value)
        asked = self._asked(_among(_noise(units), self._lines, self._places), self._value)
        return f"{shown} {', '.join(names)}.\n\n{asked}"


class CommonWords(Question):
    """A list of words; asked for are those that come most often. More text has more other words. An
    example with its answer stands before it."""

    answer_tokens = 120

    def __init__(self, cell: Cell, rng: random.Random) -> None:
        words = _words(rng)
        self._example = list(islice(words, COMMON)), list(islice(words, 2 * COMMON))
        self.answers = list(islice(words, COMMON))
        self._others: list[str] = []
        self._words = words
        self._order = rng.random()
        short = cell.length < SHORT
        self._common_repeats = SHORT_COMMON_REPEATS if short else COMMON_REPEATS
        self._other_repeats = SHORT_OTHER_REPEATS if short else OTHER_REPEATS

    def _asked(self, words: list[str]) -> str:
        random.Random(self._order).shuffle(words)
        return (
            "Here is a list of words, some of which come more often than others. Remember those "
            f"that come most often.\n{' '.join(words)}\n"
            f"Question: Which {COMMON} words come most often in the list?\n"
            "Answer: The words that come most often are"
        )

    def prompt(self, units: int) -> str:
        missing = max(0, units - len(self._others))
        self._others += islice(self._words, missing)
        common, others = self._example
        shown = self._asked(common * 3 + others)
        asked = self._asked(
            self.answers * self._common_repeats + self._others[:units] * self._other_repeats
        )
        return f"{shown} {', '.join(common)}.\n\n{asked}"


class FrequentWords(Question):
    """Coded words as often as Zipf's law has it, the most frequent of which are dots that don't
    count; asked for are the three that come next."""

    answer_tokens = 50
    least = 100

    def __init__(self, cell: Cell, rng: random.Random) -> None:
        self._words = _words(rng, syllables=2)
        self._ranked = ["...", *islice(self._words, FREQUENT)]
        self.answers = self._ranked[1:]
        self._order = rng.random()

    def prompt(self, units: int) -> str:
        total = math.fsum(rank**-ZIPF for rank in range(1, units + 1))
        words: list[str] = []
        for rank in range(1, units + 1):
            count = round(units * rank**-ZIPF / total)
            if count == 0:
                break
            if rank > len(self._ranked):
                self._ranked.append(next(self._words))
            words += [self._ranked[rank - 1]] * count
        random.Random(self._order).shuffle(words)
        return (
            "Read the following coded text, and count how often each coded word comes. Dots don't "
            f"count.\n{' '.join(words)}\n"
            f"Question: Which {FREQUENT} coded words come most often?\n"
            "Answer: The coded words that come most often are"
        )


_QUESTIONS: dict[TaskName, type[Question]] = {
    "niah_single_1": Needles,
    "niah_multikey": ManyNeedles,
    "vt": Variables,
    "cwe": CommonWords,
    "fwe": FrequentWords,
}


def question_of(cell: Cell) -> Question:
    """Return a cell's question; the same whenever it is asked for."""
    rng = random.Random(f"{cell.seed} {cell.task} {cell.length} {cell.number}")
    return _QUESTIONS[cell.task](cell, rng)


class PromptBuilder:
    """Makes prompts that are as long as their length allows, to a unit of their text.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def prompt(self, cell: Cell) -> list[int]:
        """Return the tokens of a cell's prompt.

        Raises:
            ValueError: the length has no room for the smallest text.
        """
        question = question_of(cell)
        room = cell.length - question.answer_tokens
        units = question.least
        best = self._tokens(question, units)
        if len(best) > room:
            raise ValueError(
                f"{cell.task} takes {len(best) + question.answer_tokens} tokens at least: leave "
                f"{cell.length} out of --lengths, or {cell.task} out of --tasks"
            )
        # Tokens grow about evenly with units: steps by what is left, then by halves.
        too_many: int | None = None
        step = max(1, (room - len(best)) // 16)
        while too_many is None or too_many - units > 1:
            tried = units + step if too_many is None else min(units + step, too_many - 1)
            tokens = self._tokens(question, tried)
            if len(tokens) > room:
                too_many = tried
                step = max(1, (too_many - units) // 2)
                continue
            per_unit = max((len(tokens) - len(best)) / (tried - units), 0.5)
            units, best = tried, tokens
            step = max(1, int((room - len(best)) / per_unit))
        return best

    def _tokens(self, question: Question, units: int) -> list[int]:
        return list(self._tokenizer.encode(question.prompt(units)))


def grade(answer: str, cell: Cell) -> float:
    """Return how much of what is expected stands in an answer, from 0 to 1; see `RULE`."""
    expected, said = question_of(cell).answers, answer.lower()
    return sum(each.lower() in said for each in expected) / len(expected)


TASK = Task(
    name="ruler",
    title="RULER's tasks, done",
    cell=Cell,
    row="task",
    row_title="task",
    row_text=str,
    is_split=True,
    count="samples",
    prompts=PromptBuilder,
    answer_tokens=lambda cell: _QUESTIONS[cell.task].answer_tokens,
    grade=grade,
    rule=RULE,
)
