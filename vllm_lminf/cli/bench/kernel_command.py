"""Time the attention and rotation kernels beside vLLM's own, on the same data.

Attention is compared with vLLM's kernel at the same window and with its full attention: in decode,
in prefill, and in batches of both. Written to the output folder: bench-kernel.png, results.json and
a log.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from vllm_lminf.cli.bench.kernel_job import (
    N_GLOBALS,
    KernelJob,
    KernelResult,
    full_job,
    small_job,
)
from vllm_lminf.cli.bench.running import DTYPES, prepare_output, print_notes, run_job, write_results
from vllm_lminf.cli.errors import CliError
from vllm_lminf.cli.machine import machine

HELP = "time the kernels beside vLLM's own at the same window"

SIZES = {"window": 2048, "length": 32768, "chunk": 2048, "rounds": 15}
SMALL_SIZES = {"window": 200, "length": 700, "chunk": 130, "rounds": 2}

PICTURE = "bench-kernel.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench kernel``."""
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    for name, text in (
        ("rounds", "turns of every kernel"),
        ("window", "tokens that a query sees, its own included"),
        ("length", "tokens in the cache of every request"),
    ):
        parser.add_argument(
            f"--{name}", type=int, metavar="N", help=f"{text} (default: {SIZES[name]})"
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


def run(args: argparse.Namespace) -> None:
    """Run the benchmark."""
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
    draw_kernel(job, result, args.output / PICTURE)
    for table in kernel_tables(job, result):
        table.print(console)
    print_notes(console, kernel_notes(job, result), args.output, PICTURE)


def kernel_job(args: argparse.Namespace) -> KernelJob:
    """Return what is to be measured; refuse numbers that make no benchmark."""
    given = {name: getattr(args, name) for name in ("window", "length", "rounds")}
    sizes = dict(SMALL_SIZES if args.small else SIZES)
    sizes |= {name: value for name, value in given.items() if value is not None}
    threads = int(machine()["cores"]) if args.threads is None else args.threads
    problems = [
        f"--{name} {value}: it must be 1 or more"
        for name, value in {**sizes, "threads": threads}.items()
        if value < 1
    ]
    least = sizes["window"] + max(N_GLOBALS) + sizes["chunk"]
    if sizes["length"] < least:
        problems.append(
            f"--length {sizes['length']}: it must be {least} or more, so that the window "
            f"({sizes['window']}) of every query of a chunk ({sizes['chunk']}) lies behind "
            f"{max(N_GLOBALS)} global tokens"
        )
    if problems:
        raise CliError("\n".join(problems))
    make = small_job if args.small else full_job
    return make(**sizes, threads=threads, dtype=args.dtype)
