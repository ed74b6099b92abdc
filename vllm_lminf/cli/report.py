"""The outcome of ``vllm-lminf eval nll`` as a table on the terminal and as ``results.json``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lminf.cli.machine import machine, versions
from vllm_lminf.cli.scoring_job import NLL_BUCKET, EngineName, LengthFigures, ScoringResult

if TYPE_CHECKING:
    from rich.console import Console

LABELS: dict[EngineName, str] = {
    "full": "full attention",
    "lminf": "LMINF",
    "server": "server",
}

Cell = Callable[[LengthFigures], str]
COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("NLL", lambda f: f"{f.nll:.3f}"),
    ("prefill\ntok/s", lambda f: _shown(f.prefill_tokens_per_s, ".0f")),
    ("decode\nms/tok", lambda f: _shown(f.decode_ms_per_token, ".1f")),
    ("KV\nblocks", lambda f: _shown(f.kv_blocks, "d")),
)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


@dataclass(frozen=True)
class Evaluation:
    """One run of the command: what was asked, and what each engine measured."""

    model: str
    text: str
    text_tokens: int
    trained_length: int | None
    lengths: list[int]
    settings: dict[str, Any]
    environment: dict[str, str]
    results: dict[EngineName, ScoringResult]

    def beyond_trained(self, length: int) -> bool:
        """Whether the model was never trained at this length."""
        return self.trained_length is not None and length > self.trained_length


def table_rows(evaluation: Evaluation) -> list[list[str]]:
    """Return the table's cells, a row per length; ``*`` marks those beyond the trained length."""
    by_engine = [result.figures for result in evaluation.results.values()]
    rows = []
    for figures in zip(*by_engine, strict=True):
        length = figures[0].length
        mark = " *" if evaluation.beyond_trained(length) else "  "
        rows.append([f"{length}{mark}"] + [cell(f) for _, cell in COLUMNS for f in figures])
    return rows


def notes(evaluation: Evaluation) -> list[str]:
    """Return what a reader of the table must know."""
    result = next(iter(evaluation.results.values()))
    lines = [
        "NLL: nats per token over the last 1024 tokens (or half the length) before each length."
    ]
    if result.block_size is not None:
        lines += [
            "Prefill: measured while scoring, with the log-prob head on, for every engine.",
            "Decode: median step of one greedy request. "
            f"KV blocks: the most held at once, {result.block_size} tokens each.",
        ]
    if any(evaluation.beyond_trained(length) for length in evaluation.lengths):
        lines.insert(0, f"* beyond the trained length of {evaluation.trained_length} tokens.")
    if result.eager is not None and len({r.eager for r in evaluation.results.values()}) == 1:
        lines.append("Every engine ran eager." if result.eager else "Every engine was compiled.")
    return lines


def print_table(console: Console, evaluation: Evaluation) -> None:
    """Print the table, a rule between trained and untrained lengths, and the notes."""
    from rich.box import HORIZONTALS
    from rich.table import Table

    title = f"{Path(evaluation.model).name} on {Path(evaluation.text).name}"
    table = Table(title=title, box=HORIZONTALS, show_edge=False, pad_edge=False)
    table.add_column("length", justify="right", no_wrap=True)
    for title, _ in COLUMNS:
        for engine in evaluation.results:
            style = "cyan" if engine == "lminf" else None
            table.add_column(f"{title}\n{LABELS[engine].split()[0]}", justify="right", style=style)
    rows = table_rows(evaluation)
    for index, row in enumerate(rows):
        last_trained = (
            index + 1 < len(rows)
            and evaluation.beyond_trained(evaluation.lengths[index + 1])
            and not evaluation.beyond_trained(evaluation.lengths[index])
        )
        table.add_row(*row, end_section=last_trained)
    console.print(table)
    console.print()
    for line in notes(evaluation):
        console.print(line, style="dim", highlight=False)


def write_results(evaluation: Evaluation, path: Path) -> None:
    """Write every figure, raw and reduced, with settings, versions and machine."""
    data = {
        **asdict(evaluation),
        "nll_curve_tokens_per_point": NLL_BUCKET,
        "versions": versions(),
        "machine": machine(),
    }
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def serve_command(model: str, lminf: Mapping[str, int]) -> str:
    """Return the shell command that serves the model with the settings that were measured."""
    words = ["vllm", "serve", model, "--max-model-len", "1000000"]
    if lminf:
        words += ["--additional-config", json.dumps({"lminf": dict(lminf)})]
    return f"VLLM_ATTENTION_BACKEND=LMINF {shlex.join(words)}"
