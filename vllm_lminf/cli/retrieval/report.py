"""The outcome of ``eval passkey`` and ``eval ruler``: a table, a heat map per system, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from vllm_lminf.cli.machine import machine, versions
from vllm_lminf.cli.report import LABELS as NLL_LABELS
from vllm_lminf.cli.retrieval.results import Share
from vllm_lminf.cli.retrieval.task import Task

if TYPE_CHECKING:
    from rich.console import Console

System = Literal["lminf", "full", "window", "middle", "server"]
SYSTEMS: tuple[System, ...] = get_args(System)

LABELS: dict[System, str] = {
    "lminf": NLL_LABELS["lminf"],
    "full": NLL_LABELS["full"],
    "window": "sliding window",
    "middle": "LMINF, middle",
    "server": "server",
}

Shares = Mapping[tuple[int, Any], Share]
"""By length and row, see `Task.row`; only where something was answered."""


@dataclass(frozen=True)
class Outcome:
    """One run of the command.

    Attributes:
        task: what was asked.
        command: the command line that made it.
        model: its name.
        trained_length: in tokens; None if it isn't known.
        settings: of each system, what its answers depend on beside their cells.
        environment: the variables that change the figures.
        lengths: ascending.
        rows: in order.
        count: questions for each length and row.
        shares: of each system that answered, what it found.
        failures: why a system did not answer everything.
    """

    task: Task
    command: str
    model: str
    trained_length: int | None
    settings: Mapping[System, Mapping[str, Any]]
    environment: Mapping[str, str]
    lengths: list[int]
    rows: list[Any]
    count: int
    shares: Mapping[System, Shares]
    failures: Mapping[System, str]

    def at_length(self, system: System, length: int) -> Share | None:
        """Return what a system found at a length, all rows together; None where nothing was
        answered.
        """
        shares = [share for (at, _), share in self.shares[system].items() if at == length]
        if not shares:
            return None
        return Share(sum(share.found for share in shares), sum(share.asked for share in shares))


def table_rows(outcome: Outcome) -> list[list[str]]:
    """Return the table's cells, a row for each system and length; ``*`` marks lengths beyond the
    trained one.
    """
    rows = []
    for system in outcome.shares:
        for length in outcome.lengths:
            share = outcome.at_length(system, length)
            beyond = outcome.trained_length is not None and length > outcome.trained_length
            figures = ["-", "-", "-"]
            split = []
            if outcome.task.is_split:
                of_rows = (outcome.shares[system].get((length, row)) for row in outcome.rows)
                split = ["-" if each is None else f"{each.mean:.2f}" for each in of_rows]
            if share is not None:
                low, high = share.interval
                figures = [
                    f"{share.found:.4g}/{share.asked}",
                    f"{share.mean:.3f}",
                    f"{low:.3f} to {high:.3f}",
                ]
            mark = " *" if beyond else "  "
            rows.append([LABELS[system], f"{length}{mark}", *split, *figures])
    return rows


def print_table(console: Console, outcome: Outcome) -> None:
    """Print the table, and what a reader of it must know."""
    from rich.box import HORIZONTALS
    from rich.table import Table

    title = f"{outcome.task.title} by {outcome.model}"
    table = Table(title=title, box=HORIZONTALS, show_edge=False, pad_edge=False)
    table.add_column("system", no_wrap=True)
    texts = map(outcome.task.row_text, outcome.rows) if outcome.task.is_split else ()
    split = [text.replace("_", "\n", 1) for text in texts]
    for heading in ("length", *split, "found", "share", "95% interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, row in enumerate(table_rows(outcome), 1):
        table.add_row(*row, end_section=number % len(outcome.lengths) == 0)
    console.print(table)
    console.print()
    notes = [
        f"{len(outcome.rows)} {outcome.task.row}s, {outcome.count} {outcome.task.count} each; the "
        f"interval is Wilson's. Found: {outcome.task.rule}."
    ]
    if outcome.trained_length is not None and outcome.lengths[-1] > outcome.trained_length:
        notes.insert(0, f"* beyond the trained length of {outcome.trained_length} tokens.")
    for line in notes:
        console.print(line, style="dim", highlight=False)


def as_data(outcome: Outcome) -> dict[str, Any]:
    """Return what the file of JSON holds."""
    return {
        "command": outcome.command,
        "model": outcome.model,
        "trained_length": outcome.trained_length,
        "settings": outcome.settings,
        "environment": outcome.environment,
        outcome.task.count: outcome.count,
        "rule": outcome.task.rule,
        "lengths": [
            {"system": system, "length": length, **_figures(share)}
            for system in outcome.shares
            for length in outcome.lengths
            if (share := outcome.at_length(system, length)) is not None
        ],
        "cells": [
            {"system": system, "length": length, outcome.task.row: row, **_figures(share)}
            for system, shares in outcome.shares.items()
            for (length, row), share in shares.items()
        ],
        "failures": outcome.failures,
        "versions": versions(),
        "machine": machine(),
    }


def write(outcome: Outcome, output: Path) -> list[Path]:
    """Write the figures as JSON and a heat map per system; return their paths."""
    name = outcome.task.name
    path = output / f"{name}.json"
    path.write_text(json.dumps(as_data(outcome), indent=2) + "\n", encoding="utf-8")
    pictures = [output / f"{name}-{system}.png" for system in outcome.shares]
    for system, picture in zip(outcome.shares, pictures, strict=True):
        draw(outcome, system, picture)
    return [path, *pictures]


def draw(outcome: Outcome, system: System, path: Path) -> None:
    """Draw a system's share at each length (across) and row (down) as a PNG."""
    from matplotlib.figure import Figure

    lengths, rows, shares = outcome.lengths, outcome.rows, outcome.shares[system]
    task = outcome.task
    size = (3.0 + 0.8 * len(lengths), 2.0 + 0.4 * len(rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    nothing = float("nan")
    grid = [
        [share.mean if (share := shares.get((n, row))) else nothing for n in lengths]
        for row in rows
    ]
    image = axes.imshow(grid, cmap="RdYlBu", vmin=0, vmax=1, aspect="auto")
    for down, values in enumerate(grid):
        for column, value in enumerate(values):
            text = "" if value != value else f"{value:.2f}"
            color = "white" if abs(value - 0.5) > 0.35 else "black"  # on dark ends
            axes.text(column, down, text, ha="center", va="center", fontsize=9, color=color)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(rows)), [task.row_text(row) for row in rows])
    axes.set(xlabel="length, tokens", ylabel=task.row_title, title=LABELS[system])
    figure.colorbar(image, label=task.title)
    figure.suptitle(outcome.model, fontsize=11)
    figure.savefig(path)


def _figures(share: Share) -> dict[str, Any]:
    low, high = share.interval
    return {
        "found": share.found,
        "asked": share.asked,
        "share": share.mean,
        "interval_95": [low, high],
    }
