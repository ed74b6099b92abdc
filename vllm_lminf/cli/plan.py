"""Say what requests of a length will take of the KV cache, and how many of them fit, before
anything starts: with full attention, with LMINF at some windows, and with the middle on the host.

The figures come from the caches of the model's layers and the bound that an engine plans its pool
and admits requests by. No weights are read: a folder with a config.json will do. Options that
aren't listed are those of `vllm serve` for its engine, and change the figures as they do there
(--kv-cache-dtype, --block-size, --max-num-batched-tokens, --hf-overrides). MODEL comes first.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lminf.cli.child import ask_child
from vllm_lminf.cli.engines import (
    engine_environment,
    model_of,
    read_settings,
    reason_for_exclusion,
)
from vllm_lminf.cli.machine import versions
from vllm_lminf.cli.planning import FULL, MIDDLE, Plan, PlanJob, Row
from vllm_lminf.cli.quantities import memory, shown_bytes, tokens
from vllm_lminf.cli.settings import add_setting_arguments, settings_given
from vllm_lminf.errors import CliError

if TYPE_CHECKING:
    from rich.console import Console

HELP = "say what requests of a length take, and how many fit, before anything starts"

PASSES_ON = True

DEFAULT_TOP_K = 16
_GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plan``."""
    parser.add_argument("model", metavar="MODEL", help="folder of the checkpoint, or its name")
    parser.add_argument(
        "--max-model-len",
        type=tokens,
        required=True,
        metavar="N",
        help="tokens of a request, prompt and answer together, such as 131072, 128K or 1m",
    )
    parser.add_argument(
        "--memory",
        type=memory,
        required=True,
        metavar="SIZE",
        help="for the KV cache, of all devices together, such as 40GiB",
    )
    parser.add_argument(
        "--n-local",
        nargs="+",
        type=tokens,
        metavar="N",
        help="windows to plan (default: the trained length, a half and a quarter of it)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    add_setting_arguments(parser, leave_out=("n_local",))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan, and print it; raises ``CliError`` where LMINF serves no row that was asked for."""
    if (reason := reason_for_exclusion(os.environ)) is not None:
        raise CliError(f"{reason[0]}: {reason[1]}")
    given = settings_given(args)
    asked_for_middle = "middle_top_k" in given
    top_k = given.pop("middle_top_k", DEFAULT_TOP_K)
    read_settings({**given, "middle_top_k": top_k})
    job = PlanJob(
        model=model_of(args.model),
        max_model_len=args.max_model_len,
        memory=args.memory,
        n_local=list(dict.fromkeys(args.n_local or [])),
        settings=given,
        middle_top_k=top_k,
        engine=list(args.passed_on),
    )
    plan = ask(job)
    from rich.console import Console

    if args.json:
        print(json.dumps(as_data(job, plan), indent=2))
    else:
        print_plan(Console(), job, plan)
    wanted = [r for r in plan.rows if r.attention != FULL]
    if not asked_for_middle:
        wanted = [r for r in wanted if r.attention != MIDDLE]
    if reasons := list(dict.fromkeys(reason for row in wanted for reason in row.refused)):
        raise CliError("\n".join(["LMINF can't serve this:", *(f"  - {r}" for r in reasons)]))
    return 0


def ask(job: PlanJob) -> Plan:
    """Have a child process plan."""
    environ = engine_environment(os.environ, lminf=False)
    # Full attention is planned beyond the trained length too.
    environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return Plan.from_json(ask_child("vllm_lminf.cli.planning", asdict(job), environ))


def as_data(job: PlanJob, plan: Plan) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    return {
        "model": job.model,
        "max_model_len": job.max_model_len,
        "memory_bytes": job.memory,
        "trained_length": plan.trained_length,
        "max_in_flight_tokens": plan.max_in_flight_tokens,
        "device": plan.device,
        "rows": [
            {
                **asdict(row),
                "request_bytes": row.request_bytes,
                "archive_request_bytes": row.archive_request_bytes,
                "requests": row.requests,
            }
            for row in plan.rows
        ],
        "versions": versions(),
    }


def label(row: Row) -> str:
    """Return what a row is called."""
    if row.attention == FULL:
        return "full attention"
    settings: Mapping[str, Any] = row.settings or {}
    middle = f", middle_top_k {settings['middle_top_k']}" if row.attention == MIDDLE else ""
    return f"LMINF, n_local {settings['n_local']}{middle}"


def print_plan(console: Console, job: PlanJob, plan: Plan) -> None:
    """Print the table, and what a reader of it must know."""
    from rich.box import HORIZONTALS
    from rich.table import Table

    table = Table(box=HORIZONTALS, show_edge=False, pad_edge=False)
    table.title = f"{Path(job.model).name}: requests of {job.max_model_len} tokens"
    table.add_column("attention")
    for heading in ("KV cache\na request", "on the host\na request"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"fit in\n{shown_bytes(job.memory)}", justify="right", no_wrap=True)
    for row in plan.rows:
        if row.refused:
            table.add_row(label(row), "-", "-", "not served")
            continue
        on_host = shown_bytes(row.archive_request_bytes) if row.archive_request_bytes else "-"
        table.add_row(label(row), shown_bytes(row.request_bytes), on_host, str(row.requests))
    console.print(table)
    console.print()
    for line in notes(job, plan):
        console.print(line, style="dim", highlight=False, markup=False)


def notes(job: PlanJob, plan: Plan) -> list[str]:
    """Return what a reader of the table must know."""
    sizes = dict.fromkeys(row.block_size for row in plan.rows if not row.refused)
    blocks = " or ".join(map(str, sizes))
    lines = [
        f"On {plan.device}, in blocks of {blocks} tokens. A request holds at most this much, with "
        f"{plan.max_in_flight_tokens} tokens in flight (--max-num-batched-tokens); "
        "--max-num-seqs limits how many run too."
    ]
    for row in plan.rows:
        if row.attention == MIDDLE and not row.refused and row.settings is not None:
            held = row.archive_pages // row.archive_request_pages
            gib = row.settings["archive_gib"]
            line = f"archive_gib {gib:g} holds {held} of these requests on the host"
            if held == 0:
                # A page more is vLLM's null block.
                least = (row.archive_request_pages + 1) * row.archive_page_bytes
                line += f": set it to {-(-least * 100 // _GIB) / 100:g} or more (--archive-gib)"
            lines.append(f"{line}.")
            break
    if plan.trained_length is not None and job.max_model_len > plan.trained_length:
        lines.append(
            f"Trained on {plan.trained_length} tokens: beyond, full attention is here for its size "
            "alone."
        )
    refused = dict.fromkeys(
        f"{'The middle' if row.attention == MIDDLE else label(row)} isn't served: {reason}"
        for row in plan.rows
        for reason in row.refused
    )
    return [*lines, *refused]
