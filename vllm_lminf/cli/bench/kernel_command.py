"""Time the attention and rotation kernels beside vLLM's own, on the same data.

Attention is compared with vLLM's kernel at the same window and with its full attention: in decode,
in prefill, and in batches of both. With --device cuda, the kernels for GPUs are timed beside what
else runs there, and beside what the device achieves: that takes PyTorch and Triton alone. Written
to the output folder: bench-kernel.png, results.json and a log.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from vllm_lminf.cli.bench.device_job import (
    DeviceJob,
    DeviceResult,
    full_device_job,
    small_device_job,
)
from vllm_lminf.cli.bench.kernel_job import (
    N_GLOBALS,
    KernelJob,
    KernelResult,
    full_job,
    small_job,
)
from vllm_lminf.cli.bench.running import DTYPES, prepare_output, print_notes, run_job, write_results
from vllm_lminf.cli.machine import machine
from vllm_lminf.errors import CliError

HELP = "time the kernels beside vLLM's own at the same window"

SIZES = {"window": 2048, "length": 32768, "chunk": 2048, "rounds": 15}
SMALL_SIZES = {"window": 200, "length": 700, "chunk": 130, "rounds": 2}
DEVICE_SIZES = {"window": 4096, "length": 8192, "rounds": 15}
SMALL_DEVICE_SIZES = {"window": 64, "length": 200, "rounds": 2}

PICTURE = "bench-kernel.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench kernel``."""
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    for name, text in (
        ("rounds", "turns of every kernel"),
        ("window", "tokens that a query sees, its own included"),
        ("length", "tokens in the cache of every request"),
    ):
        default = str(SIZES[name])
        if DEVICE_SIZES[name] != SIZES[name]:
            default += f"; with --device cuda {DEVICE_SIZES[name]}"
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of a kernel for CPUs (default: all cores of this process)",
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
    if args.device == "cuda":
        _run_on_device(args)
    else:
        _run_on_cpu(args)


def _run_on_cpu(args: argparse.Namespace) -> None:
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


def _run_on_device(args: argparse.Namespace) -> None:
    job = device_job(args)
    import torch

    if not torch.cuda.is_available():
        raise CliError(
            f"--device cuda: PyTorch {torch.__version__} finds no CUDA device here; --device cpu "
            "times the kernels for CPUs"
        )
    prepare_output(args.output)
    from rich.console import Console

    from vllm_lminf.cli.bench.device_plot import draw_device
    from vllm_lminf.cli.bench.device_report import device_notes, device_tables

    console = Console()
    data = run_job(
        console,
        "vllm_lminf.cli.bench.device",
        asdict(job),
        total=job.num_steps,
        env=dict(os.environ),
        log_path=args.output / "bench-kernel.log",
    )
    result = DeviceResult.from_json(data)
    write_results(args.output, job=asdict(job), result=data)
    draw_device(job, result, args.output / PICTURE)
    for table in device_tables(job, result):
        table.print(console)
    print_notes(console, device_notes(job, result), args.output, PICTURE)


def kernel_job(args: argparse.Namespace) -> KernelJob:
    """Return what is to be measured; refuse numbers that make no benchmark."""
    sizes = _sizes(args, SMALL_SIZES if args.small else SIZES)
    threads = int(machine()["cores"]) if args.threads is None else args.threads
    problems = _too_small({**sizes, "threads": threads})
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


def device_job(args: argparse.Namespace) -> DeviceJob:
    """The same for ``--device cuda``."""
    sizes = _sizes(args, SMALL_DEVICE_SIZES if args.small else DEVICE_SIZES)
    problems = _too_small(sizes)
    if args.threads is not None:
        problems.append(f"--threads {args.threads}: there are none with --device cuda")
    least = sizes["window"] + max(N_GLOBALS)
    if sizes["length"] < least:
        problems.append(
            f"--length {sizes['length']}: it must be {least} or more, so that the window "
            f"({sizes['window']}) of every query lies behind {max(N_GLOBALS)} global tokens"
        )
    if problems:
        raise CliError("\n".join(problems))
    make = small_device_job if args.small else full_device_job
    return make(**sizes, dtype=args.dtype)


def _sizes(args: argparse.Namespace, defaults: dict[str, int]) -> dict[str, int]:
    given = {name: getattr(args, name) for name in ("window", "length", "rounds")}
    return defaults | {name: value for name, value in given.items() if value is not None}


def _too_small(sizes: dict[str, int]) -> list[str]:
    return [f"--{name} {value}: it must be 1 or more" for name, value in sizes.items() if value < 1]
