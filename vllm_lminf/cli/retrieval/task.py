"""What a measure asks: its questions, their prompts, and when an answer is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

_TASKS = {
    "passkey": "vllm_lminf.cli.passkey.task",
    "ruler": "vllm_lminf.cli.ruler.task",
}


class Tokenizer(Protocol):
    """What is needed of a tokenizer of transformers'."""

    def encode(self, text: str, **options: Any) -> list[int]:
        """Tokens of a text, special ones before it included unless ``add_special_tokens`` is
        False.
        """
        ...

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens."""
        ...


class Prompts(Protocol):
    """Makes prompts for one tokenizer."""

    def prompt(self, cell: Any) -> list[int]:
        """Return the tokens of a question's prompt; with the answer's no more than its length.

        Raises:
            ValueError: the question doesn't fit the length, or the tokenizer.
        """
        ...


@dataclass(frozen=True)
class Task:
    """A measure.

    Attributes:
        name: of the measure, and of what is written.
        title: of its table.
        cell: a frozen dataclass: one question. It has a length in tokens, prompt and answer
            together, and what ``row`` names.
        row: the attribute by which questions of a length are told apart in pictures.
        row_title: what that is, for a picture's axis.
        row_text: how a value of it is shown.
        is_split: whether the table has a column for each row of the pictures.
        count: what the number of questions of a length and row is called.
        prompts: makes prompts for a tokenizer.
        answer_tokens: how many tokens are generated for a question.
        grade: how right an answer is, from 0 to 1, to a question.
        rule: the same in words.
    """

    name: str
    title: str
    cell: type[Any]
    row: str
    row_title: str
    row_text: Callable[[Any], str]
    is_split: bool
    count: str
    prompts: Callable[[Tokenizer], Prompts]
    answer_tokens: Callable[[Any], int]
    grade: Callable[[str, Any], float]
    rule: str


def find_task(name: str) -> Task:
    """Return a measure by its name."""
    task: Task = import_module(_TASKS[name]).TASK
    return task
