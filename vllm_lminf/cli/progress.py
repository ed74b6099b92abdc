"""How far the engines are: bars on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_lminf.cli.child import Event

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 10.0
"""Least seconds between two plain lines about the same phase."""


class Lines:
    """Plain lines, for logs and pipes."""

    def __init__(self, console: Console, total: int, unit: str) -> None:
        self._console = console
        self._total, self._unit = total, unit
        self._begin = self._last = time.monotonic()

    def show(self, engine: str, event: Event) -> None:
        """Show one event: a new phase, or how much is done."""
        if event["event"] == "phase":
            self._print(f"{engine}: {event['text']}")
        elif time.monotonic() - self._last >= LINE_SECONDS:
            self._print(f"{engine}: {event['done']} of {self._total} {self._unit}")

    def finish(self, engine: str) -> None:
        """Say that the engine has done all its work."""
        self._print(f"{engine}: done")

    def _print(self, text: str) -> None:
        self._last = time.monotonic()
        self._console.print(f"[{self._last - self._begin:4.0f} s] {text}", markup=False)


class Bars:
    """The same as one bar per engine; its length is what the engine has done."""

    def __init__(self, console: Console, engines: Sequence[str], total: int, unit: str) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._total = total
        self.progress = Progress(
            TextColumn("{task.description:>15}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("{task.fields[phase]}"),
            console=console,
        )
        self._tasks = {
            engine: self.progress.add_task(engine, total=total, phase="waiting", start=False)
            for engine in engines
        }

    def show(self, engine: str, event: Event) -> None:
        task = self._tasks[engine]
        if event["event"] == "phase":
            self.progress.start_task(task)
            self.progress.update(task, phase=event["text"])
        else:
            self.progress.update(task, completed=event["done"])

    def finish(self, engine: str) -> None:
        task = self._tasks[engine]
        self.progress.update(task, completed=self._total, phase="done")
        self.progress.stop_task(task)


@contextmanager
def display(
    console: Console, engines: Sequence[str], total: int, unit: str = "tokens"
) -> Iterator[Lines | Bars]:
    """Show the progress of ``engines``, each of which has ``total`` tokens, or what ``unit`` says,
    to do.
    """
    if not console.is_terminal:
        yield Lines(console, total, unit)
        return
    bars = Bars(console, engines, total, unit)
    with bars.progress:
        yield bars
