"""Measure what Λ-attention costs beside vLLM's own attention, on this machine.

What is compared takes turns in one process, so that the ratios hold on a machine that is busy with
other things too; correctness is checked before anything is timed.
"""

from __future__ import annotations

import argparse
from types import ModuleType

from vllm_lminf.cli.bench import engine_command, kernel_command, start_command

HELP = "measure what LMINF costs beside vLLM's own attention"

BENCHMARKS: dict[str, ModuleType] = {
    "kernel": kernel_command,
    "engine": engine_command,
    "start": start_command,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks, each with its options."""
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, benchmark in BENCHMARKS.items():
        subparser = subparsers.add_parser(
            name,
            help=benchmark.HELP,
            description=benchmark.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        benchmark.add_arguments(subparser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was named; raises ``CliError`` for what the user can put right."""
    BENCHMARKS[args.benchmark].run(args)
    return 0
