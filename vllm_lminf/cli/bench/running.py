"""What the benchmarks share: their output folder, their child process, their results file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lminf.cli.child import run_child
from vllm_lminf.cli.machine import machine, versions
from vllm_lminf.errors import CliError

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = ("bfloat16", "float16", "float32")
RESULTS = "results.json"


def prepare_output(output: Path) -> None:
    """Make the output folder; refuse to measure what could not be drawn or written."""
    if find_spec("matplotlib") is None:
        raise CliError("matplotlib is not installed: pip install 'matplotlib>=3.9,<4'")
    make_folder(output)


def make_folder(output: Path) -> None:
    """Make the output folder, or say why it can't be made."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"--output {output}: {error.strerror}") from error


def run_job(
    console: Console,
    module: str,
    job: dict[str, Any],
    *,
    total: int,
    env: dict[str, str],
    log_path: Path,
) -> Any:
    """Run a benchmark's child process under a progress bar and return its result."""
    from vllm_lminf.cli.progress import display

    label = log_path.stem.replace("-", " ")
    with display(console, [label], total, unit="steps") as shown:
        result = run_child(
            module, job, env=env, log_path=log_path, on_event=lambda event: shown.show(label, event)
        )
        shown.finish(label)
    return result


def write_results(output: Path, **data: Any) -> None:
    """Write every raw figure, with versions and machine."""
    data = {**data, "versions": versions(), "machine": machine()}
    text = json.dumps(data, indent=2)
    (output / RESULTS).write_text(text + "\n", encoding="utf-8")


def print_notes(console: Console, notes: Sequence[str], output: Path, picture: str) -> None:
    """Print what a reader of the tables must know, and where everything was written."""
    for line in notes:
        console.print(line, style="dim", highlight=False)
    console.print(f"Written: {output / picture}, {output / RESULTS}", highlight=False)
