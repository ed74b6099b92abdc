"""Time a model under LMINF and under full attention, over growing lengths.

Two real vLLM engines are alive in one process and take turns: prefill of cold prompts, decode after
prompts that the prefix cache holds, KV cache held. Written to the output folder: bench-engine.png,
results.json and a log.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_lminf.cli.bench.engine_job import EngineJob, EngineResult
from vllm_lminf.cli.bench.running import DTYPES, prepare_output, print_notes, run_job, write_results
from vllm_lminf.cli.eval import RECORDED_VARIABLES, check_settings, engine_environment, is_utf8
from vllm_lminf.cli.lengths import parse_lengths
from vllm_lminf.errors import CliError

HELP = "time a model under LMINF and under full attention, over growing lengths"

LENGTHS = {"lengths": "1024,4096,8192,16384,32768", "lminf_lengths": "131072"}
SMALL_LENGTHS = {"lengths": "100,256,512", "lminf_lengths": "1024"}
SIZES = {"n_local": 2048, "chunk": 2048, "rounds": 3, "decode_rounds": 16, "decode_tokens": 16}
SMALL_SIZES = {"n_local": 128, "chunk": 128, "rounds": 2, "decode_rounds": 2, "decode_tokens": 3}

PICTURE = "bench-engine.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench engine``."""
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    parser.add_argument(
        "--text", type=Path, help="UTF-8 text file to take prompts from (default: random tokens)"
    )
    for name, text in (
        ("lengths", "tokens, with commas between, that both engines run"),
        ("lminf-lengths", "more of them, for LMINF alone; '' for none"),
    ):
        parser.add_argument(f"--{name}", help=f"{text} (default: {LENGTHS[_variable(name)]})")
    for name, text in (
        ("n-local", "LMINF setting: tokens in the window, a token's own included"),
        ("chunk", "tokens prefilled in one step"),
        ("rounds", "how often everything is prefilled"),
        ("decode-rounds", "how often everything is decoded"),
        ("decode-tokens", "tokens that are timed in each decode"),
    ):
        parser.add_argument(
            f"--{name}", type=int, metavar="N", help=f"{text} (default: {SIZES[_variable(name)]})"
        )
    parser.add_argument(
        "--n-global", type=int, metavar="N", help="LMINF setting: first tokens that stay visible"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=DTYPES, help="of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--pool",
        type=float,
        default=4.0,
        metavar="GIB",
        help="size of the KV cache for which it is told how many requests fit (default: 4)",
    )
    parser.add_argument(
        "--small", action="store_true", help="short lengths, for a tiny model: a test, no benchmark"
    )


def run(args: argparse.Namespace) -> None:
    """Run the benchmark."""
    job = engine_job(args)
    prepare_output(args.output)
    from rich.console import Console

    from vllm_lminf.cli.bench.engine_plot import draw_engine
    from vllm_lminf.cli.bench.engine_report import engine_notes, engine_tables

    console = Console()
    environ = dict(os.environ)
    data = run_job(
        console,
        "vllm_lminf.cli.bench.engine",
        asdict(job),
        total=job.num_steps,
        # LMINF is selected by the engine's arguments: a variable would select it for both.
        env=engine_environment("full", environ),
        log_path=args.output / "bench-engine.log",
    )
    result = EngineResult.from_json(data)
    recorded = {k: v for k, v in environ.items() if k.startswith(RECORDED_VARIABLES)}
    write_results(
        args.output, job=asdict(job), result=data, pool_gib=args.pool, environment=recorded
    )
    draw_engine(job, result, args.output / PICTURE)
    for table in engine_tables(job, result, args.pool):
        table.print(console)
    print_notes(console, engine_notes(job, result), args.output, PICTURE)


def engine_job(args: argparse.Namespace) -> EngineJob:
    """Return what is to be measured; refuse what can be seen to be wrong before anything starts."""
    lengths = _chosen(args, SMALL_LENGTHS if args.small else LENGTHS)
    sizes = _chosen(args, SMALL_SIZES if args.small else SIZES)
    settings = {"n_local": sizes.pop("n_local")}
    if args.n_global is not None:
        settings["n_global"] = args.n_global
    problems = [
        f"--{name.replace('_', '-')} {value}: it must be 1 or more"
        for name, value in sizes.items()
        if value < 1
    ]
    if not args.pool > 0:
        problems.append(f"--pool {args.pool:g}: it must be more than 0")
    if not (args.model / "config.json").is_file():
        problems.append(f"--model {args.model}: no checkpoint there (it has no config.json)")
    if args.text is not None and not (args.text.is_file() and is_utf8(args.text)):
        problems.append(f"--text {args.text}: no such file, or not UTF-8 text")
    if problems:
        raise CliError("\n".join(problems))
    check_settings(settings, None)
    return EngineJob(
        model=str(args.model),
        dtype=args.dtype,
        text=None if args.text is None else str(args.text),
        lengths=parse_lengths(lengths["lengths"]),
        lminf_lengths=parse_lengths(lengths["lminf_lengths"]) if lengths["lminf_lengths"] else [],
        lminf=settings,
        **sizes,
    )


def _chosen(args: argparse.Namespace, defaults: dict[str, Any]) -> dict[str, Any]:
    """The options of these names; the default of those that were not given."""
    given = {name: getattr(args, name) for name in defaults}
    return defaults | {name: value for name, value in given.items() if value is not None}


def _variable(option: str) -> str:
    return option.replace("-", "_")
