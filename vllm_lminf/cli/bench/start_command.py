"""Time how long an engine takes to start, with LMINF and without.

Every start is a new process, timed from its first moment to the engine's first token; kinds of
start take turns. LMINF is started with its kernels compiled before, as always but the first time on
a machine, and with none. Written to the output folder: results.json and the logs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from vllm_lminf.cli.bench.running import DTYPES, RESULTS, make_folder, write_results
from vllm_lminf.cli.bench.start_job import KINDS, Kind, StartJob, StartResult
from vllm_lminf.cli.bench.start_report import start_notes, start_table
from vllm_lminf.cli.child import run_child
from vllm_lminf.errors import CliError
from vllm_lminf.plugin.config import BACKEND_NAME, BACKEND_VARIABLE

HELP = "time how long an engine takes to start, with LMINF and without"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench start``."""
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="how often each kind is started (default: 5)",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=DTYPES, help="of the model (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Run the benchmark."""
    if args.rounds < 1:
        raise CliError(f"--rounds {args.rounds}: it must be 1 or more")
    if not (args.model / "config.json").is_file():
        raise CliError(f"--model {args.model}: no checkpoint there (it has no config.json)")
    make_folder(args.output)
    from rich.console import Console

    from vllm_lminf.cli.progress import display

    console, label = Console(), "bench start"
    result = StartResult({kind: [] for kind in KINDS})
    # The first start of all brings files into memory that the others find there.
    turns: list[Kind] = ["LMINF", *KINDS * args.rounds]
    with (
        tempfile.TemporaryDirectory(prefix="lminf-bench-") as folder,
        display(console, [label], len(turns), unit="starts") as shown,
    ):
        for number, kind in enumerate(turns):
            shown.show(label, {"event": "phase", "text": f"{kind}, start {number} of {len(turns)}"})
            cache = Path(folder) / ("compiled" if kind == "LMINF" else f"empty-{number}")
            seconds = run_child(
                "vllm_lminf.cli.bench.start",
                asdict(StartJob(str(args.model), args.dtype)),
                env=_environment(kind, cache),
                log_path=args.output / f"start-{KINDS.index(kind)}.log",
                on_event=lambda event: None,
            )
            if number > 0:
                result.seconds[kind].append(seconds)
            shown.show(label, {"event": "progress", "done": number + 1})
        shown.finish(label)
    job = {"model": str(args.model), "dtype": args.dtype}
    write_results(args.output, job=job, result=asdict(result))
    start_table(result).print(console)
    for line in start_notes(result):
        console.print(line, style="dim", highlight=False)
    console.print(f"Written: {args.output / RESULTS}", highlight=False)


def _environment(kind: Kind, cache: Path) -> dict[str, str]:
    """LMINF's kernels are in a cache of the benchmark's own; what vLLM keeps stays where it is."""
    environ = dict(os.environ)
    caches = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environ.setdefault("VLLM_CACHE_ROOT", str(caches / "vllm"))
    environ["XDG_CACHE_HOME"] = str(cache)
    environ.pop(BACKEND_VARIABLE, None)
    if kind != "vLLM alone":
        environ[BACKEND_VARIABLE] = BACKEND_NAME
    return environ
