"""Measure what Λ-attention costs beside vLLM's own attention, on this machine.

`bench kernel` times the attention and rotation kernels on the same data, `bench engine` whole
engines with a model of yours. What is compared takes turns in one process, so that the ratios hold
on a machine that is busy with other things too; correctness is checked before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lminf.cli.bench.kernel_job import (
    N_GLOBALS,
    KernelJob,
    KernelResult,
    full_job,
    small_job,
)
from vllm_lminf.cli.child import run_child
from vllm_lminf.cli.errors import CliError
from vllm_lminf.cli.machine import machine, versions

if TYPE_CHECKING:
    from rich.console import Console

HELP = "measure what LMINF costs beside vLLM's own attention"

KERNEL_HELP = "time the kernels beside vLLM's own at the same window"
DTYPES = ("bfloat16", "float16", "float32")

KERNEL_SIZES = {"window": 2048, "length": 32768, "chunk": 2048, "rounds": 15}
SMALL_KERNEL_SIZES = {"window": 200, "length": 700, "chunk": 130, "rounds": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of ``bench`` and their options."""
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    kernel = commands.add_parser("kernel", help=KERNEL_HELP, description=KERNEL_HELP)
    _add_kernel_arguments(kernel)
    kernel.set_defaults(bench=run_kernel)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was named; raises ``CliError`` for what the user can put right."""
    args.bench(args)
    return 0


def _add_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    for name, text in (
        ("rounds", "turns of every kernel"),
        ("window", "tokens that a query sees, its own included"),
        ("length", "tokens in the cache of every request"),
    ):
        parser.add_argument(
            f"--{name}", type=int, metavar="N", help=f"{text} (default: {KERNEL_SIZES[name]})"
        )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of a kernel (default: all cores of this process)"
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=DTYPES,
        help="of queries and cache (default: %(default)s)",
    )
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes: for their correctness, not their times"
    )


def run_kernel(args: argparse.Namespace) -> None:
    """Run ``bench kernel``."""
    job = kernel_job(args)
    prepare_output(args.output)
    from rich.console import Console

    from vllm_lminf.cli.bench.kernel_plot import draw_kernel
    from vllm_lminf.cli.bench.kernel_report import kernel_notes, kernel_tables

    console = Console()
    data = run_job(
        console,
        "vllm_lminf.cli.bench.kernel",
        asdict(job),
        total=job.num_steps,
        env={**os.environ, "OMP_NUM_THREADS": str(job.threads)},
        log_path=args.output / "bench-kernel.log",
    )
    result = KernelResult.from_json(data)
    write_results(args.output, job=asdict(job), result=data)
    draw_kernel(job, result, args.output / "bench-kernel.png")
    for table in kernel_tables(job, result):
        table.print(console)
    print_notes(console, kernel_notes(job, result), args.output, "bench-kernel.png")


def kernel_job(args: argparse.Namespace) -> KernelJob:
    """Return what is to be measured; refuse numbers that make no benchmark."""
    sizes = SMALL_KERNEL_SIZES if args.small else KERNEL_SIZES
    given = {name: getattr(args, name) for name in ("window", "length", "rounds")}
    sizes = sizes | {name: value for name, value in given.items() if value is not None}
    threads = machine()["cores"] if args.threads is None else args.threads
    least = sizes["window"] + max(N_GLOBALS) + sizes["chunk"]
    problems = [
        f"--{name} {value}: it must be 1 or more"
        for name, value in {**sizes, "threads": threads}.items()
        if int(value) < 1
    ]
    if not problems and sizes["length"] < least:
        problems.append(
            f"--length {sizes['length']}: it must be {least} or more, so that the window "
            f"({sizes['window']}) of every query of a chunk ({sizes['chunk']}) lies behind "
            f"{max(N_GLOBALS)} global tokens"
        )
    if problems:
        raise CliError("\n".join(problems))
    make = small_job if args.small else full_job
    return make(**sizes, threads=int(threads), dtype=args.dtype)


def prepare_output(output: Path) -> None:
    """Make the output folder; refuse to measure what could not be drawn or written."""
    if find_spec("matplotlib") is None:
        raise CliError("matplotlib is not installed: pip install 'vllm-lminf[plot]'")
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
    (output / "results.json").write_text(text + "\n", encoding="utf-8")


def print_notes(console: Console, notes: Sequence[str], output: Path, picture: str) -> None:
    """Print what a reader of the tables must know, and where everything was written."""
    for line in notes:
        console.print(line, style="dim", highlight=False)
    console.print(f"Written: {output / picture}, {output / 'results.json'}", highlight=False)
