"""The passkey task of LM-Infinite (Han et al. 2024), after Mohtashami and Jaggi (2023).

A number of five digits stands somewhere in a text of five sentences that repeat; the model is asked
for it at the end. No model, no engine and no file here.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from vllm_lminf.cli.retrieval.task import Task, Tokenizer

HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"

ANSWER_TOKENS = 10
"""Tokens that are generated: five digits of a token each, and what may stand before them."""

LAST_ROUNDS = 4
"""In so many rounds of the five sentences at the end of the filler their order may change."""

ANSWER_RULE = (
    "the first five digits in a row of what is generated must be the key; text around them is not "
    "looked at, and without five in a row the key is not found"
)


@dataclass(frozen=True)
class Cell:
    """One question.

    Attributes:
        length: tokens of the prompt and the answer together.
        depth: where the key stands, from 0, before all filler, to 1, behind it.
        key: five digits.
    """

    length: int
    depth: float
    key: str


def even_depths(count: int) -> list[float]:
    """Return the middles of so many equal parts of the text.

    Neither end is among them: directly before the question the key is what small models repeat
    last, however they attend.
    """
    return [round((index + 0.5) / count, 4) for index in range(count)]


def cells_of(
    lengths: Sequence[int], depths: Sequence[float], keys: int, seed: int
) -> Iterator[Cell]:
    """Yield ``keys`` cells for each length and depth, the longest first and the deepest of each.

    In this order a prompt begins like one before it for as long as the two can: up to its own key.
    A key depends on nothing but the seed, its length, its depth and its number: more lengths,
    depths or keys leave the others what they were.
    """
    for length in sorted(lengths, reverse=True):
        for depth in sorted(depths, reverse=True):
            numbers = random.Random(f"{seed} {length} {depth}")
            for _ in range(keys):
                yield Cell(length, depth, str(numbers.randint(10000, 99999)))


class PromptBuilder:
    """Makes prompts of an exact number of tokens, which are those of the text as a whole.

    Sentences are tokenised one by one, as they are behind a full stop and a blank, and none is cut:
    half a sentence behind the key draws a model's answer away from it. So the last ones of the
    filler come in whatever order and number leaves nothing over.

    Raises:
        ValueError: the tokenizer joins sentences, so that they have no tokens of their own.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._head = list(tokenizer.encode(HEAD))
        self._question = self._tokens(QUESTION)
        self._sentences = [self._tokens(sentence) for sentence in FILLER]
        self._round = sum(map(len, self._sentences))
        self._exact: dict[int, list[list[int]]] = {0: []}
        for total in range(1, LAST_ROUNDS * self._round):
            fitting = [one for one in self._sentences if total - len(one) in self._exact]
            if fitting:
                rarest = min(fitting, key=lambda one: self._exact[total - len(one)].count(one))
                self._exact[total] = [*self._exact[total - len(rarest)], rarest]

    def prompt(self, cell: Cell) -> list[int]:
        """Return the tokens of a cell's prompt, ``ANSWER_TOKENS`` fewer than its length.

        Raises:
            ValueError: the length has no room for the question, or no whole sentences fill it, or
                the tokenizer changes digits.
        """
        needle = self._tokens(NEEDLE.format(key=cell.key))
        if self._tokenizer.decode(needle).count(cell.key) != 2:
            raise ValueError(f"the tokenizer does not give back the digits of {cell.key}")
        without = len(self._head) + len(needle) + len(self._question) + ANSWER_TOKENS
        filler = self._filler(cell.length - without)
        if filler is None:
            raise ValueError(
                f"no whole sentences fill {cell.length} tokens, of which {without} are no filler: "
                "give a longer one of --lengths, or one that is a few tokens different"
            )
        ends = [0, *accumulate(map(len, filler))]
        place = bisect_right(ends, round(cell.depth * ends[-1])) - 1
        parts = [self._head, *filler[:place], needle, *filler[place:], self._question]
        return list(chain(*parts))

    def _filler(self, room: int) -> list[list[int]] | None:
        """Sentences that fill a room, in tokens, exactly; None where none do."""
        most = room // self._round
        for rounds in range(most, max(most - LAST_ROUNDS, -1), -1):
            last = self._exact.get(room - rounds * self._round)
            if last is not None:
                return [*self._sentences * rounds, *last]
        return None

    def _tokens(self, text: str) -> list[int]:
        """Tokens of a text that stands behind a full stop and a blank."""
        stop = list(self._tokenizer.encode(".", add_special_tokens=False))
        both = list(self._tokenizer.encode(f". {text}", add_special_tokens=False))
        if both[: len(stop)] != stop:
            raise ValueError(f"the tokenizer joins a full stop with {text!r} behind it")
        return both[len(stop) :]


def is_found(answer: str, key: str) -> bool:
    """Whether an answer holds the key, by `ANSWER_RULE`: " a51234. Re" holds 51234."""
    digits = re.search(r"[0-9]{5}", answer)
    return digits is not None and digits.group() == key


TASK = Task(
    name="passkey",
    title="Passkeys found",
    cell=Cell,
    row="depth",
    row_title="depth of the key",
    row_text=lambda depth: f"{depth:.0%}",
    is_split=False,
    count="keys",
    prompts=PromptBuilder,
    answer_tokens=lambda cell: ANSWER_TOKENS,
    grade=lambda answer, cell: float(is_found(answer, cell.key)),
    rule=ANSWER_RULE,
)
