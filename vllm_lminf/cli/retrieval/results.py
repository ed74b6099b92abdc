"""Answers as they come, kept in a file of JSON lines, so that a run that ended early goes on; and
how right they are, with how sure that is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vllm_lminf.cli.retrieval.task import Task
from vllm_lminf.errors import CliError

Z_95 = 1.959964
"""The normal distribution's 97.5% quantile: 95% lie between it and its negative."""


@dataclass(frozen=True)
class Share:
    """How much was found of what was asked for: a sum of grades, each from 0 to 1."""

    found: float
    asked: int

    @property
    def mean(self) -> float:
        return self.found / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval at 95% (Wilson 1927). Grades between 0 and 1 vary less than
        right and wrong do, so that with them it is wider than need be.
        """
        n, p, square = self.asked, self.mean, Z_95**2
        centre = (p + square / (2 * n)) / (1 + square / n)
        half = Z_95 / (1 + square / n) * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


class AnswersFile:
    """Lines of JSON: what a system's answers depend on, and each answer.

    Args:
        task: what is asked.
        path: read if it is there, made otherwise.
        depend_on: of each system that will be asked, what its answers depend on beside their
            cells; plain JSON values.

    Raises:
        CliError: what a system answered before depends on something else, or it is no such file.
    """

    def __init__(self, task: Task, path: Path, depend_on: Mapping[Any, Mapping[str, Any]]) -> None:
        self._task, self._path = task, path
        depend_on = json.loads(json.dumps(depend_on))  # as it will be read again
        self._answers: dict[tuple[str, Any], str] = {}
        before = self._read() if path.exists() else {}
        problems = [
            f"{system}: {name} was {before[system].get(name)!r} and is now {now.get(name)!r}"
            for system, now in depend_on.items()
            if system in before
            for name in sorted({*before[system], *now})
            if before[system].get(name) != now.get(name)
        ]
        if problems:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            raise CliError(
                f"{path} holds answers with other settings:\n{lines}\n"
                "Give another --output, or the settings of before to go on with them"
            )
        for system, now in depend_on.items():
            if system not in before:
                self._append({"system": system, "depends_on": now})

    def add(self, system: str, cell: Any, answer: str) -> None:
        """Keep an answer."""
        self._answers[system, cell] = answer
        found = self._task.grade(answer, cell)
        self._append({"system": system, **asdict(cell), "answer": answer, "found": found})

    def pending(self, system: str, cells: Iterable[Any]) -> list[Any]:
        """Return the cells that the system has not answered yet."""
        return [cell for cell in cells if (system, cell) not in self._answers]

    def share(self, system: str, cells: Iterable[Any]) -> Share:
        """Return how right the system's answers are to those of these cells that it answered."""
        grades = [
            self._task.grade(self._answers[system, cell], cell)
            for cell in cells
            if (system, cell) in self._answers
        ]
        return Share(sum(grades), len(grades))

    def _read(self) -> dict[str, dict[str, Any]]:
        """Read the answers; return what those of each system depend on."""
        text = self._path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        depend_on: dict[str, dict[str, Any]] = {}
        try:
            for item in map(json.loads, whole.splitlines()):
                if "depends_on" in item:
                    depend_on[item["system"]] = item["depends_on"]
                else:
                    cell = self._task.cell(*(item[f.name] for f in fields(self._task.cell)))
                    self._answers[item["system"], cell] = item["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise CliError(
                f"{self._path} is no file of answers ({error!r}): give another --output"
            ) from None
        if whole != text:  # a run that was killed left half a line
            self._path.write_text(whole, encoding="utf-8")
        return depend_on

    def _append(self, item: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(item) + "\n")
