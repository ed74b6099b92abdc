"""Asking questions about long texts: the options, the systems and the way from one to the other,
for ``eval passkey`` and ``eval ruler``.

Each system is a real vLLM engine in a process of its own, one after the other, or a server that is
running. Answers are kept as they come, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lminf.cli.child import Event, run_child
from vllm_lminf.cli.engines import (
    EXTRA_BLOCK_TOKENS,
    add_engine_arguments,
    api_url,
    check_settings,
    engine_environment,
    longer_rope,
    make_folder,
    parse_names,
    problems_of_paths,
    read_facts,
    read_settings,
    recorded_variables,
)
from vllm_lminf.cli.lengths import parse_lengths
from vllm_lminf.cli.model_facts import ModelFacts
from vllm_lminf.cli.retrieval.asking import AskingJob
from vllm_lminf.cli.retrieval.report import (
    LABELS,
    SYSTEMS,
    Outcome,
    Shares,
    System,
    as_data,
    print_table,
    write,
)
from vllm_lminf.cli.retrieval.results import AnswersFile
from vllm_lminf.cli.retrieval.task import Task
from vllm_lminf.errors import CliError

if TYPE_CHECKING:
    from rich.console import Console

SERVER: System = "server"
ENGINES = tuple(system for system in SYSTEMS if system != SERVER)
RECALL_SETTINGS = ("middle_", "archive_")
"""How the names of settings begin that are for the system `middle` alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every measure has."""
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    parser.add_argument(
        "--lengths",
        nargs="+",
        required=True,
        metavar="N",
        help="tokens of prompt and answer together, such as 4096 8192",
    )
    add_number(parser, "seed", 0, "of what is hidden")
    add_number(
        parser,
        "max-num-seqs",
        4,
        "requests that run at once; on a CPU the KV cache holds as many",
    )
    parser.add_argument("--systems", help=f"of {','.join(ENGINES)} (default: lminf,full)")
    parser.add_argument(
        "--n-local",
        type=int,
        metavar="N",
        help="tokens in the window, a token's own included (default: the trained length)",
    )
    parser.add_argument(
        "--middle-top-k", type=int, metavar="N", help="setting middle_top_k of the system middle"
    )
    parser.add_argument(
        "--lminf",
        metavar="JSON",
        help="more settings of LMINF, such as '{\"n_global\": 4}'; those of the middle are for the "
        "system middle alone",
    )
    parser.add_argument(
        "--url", help="ask this OpenAI-compatible server, such as http://localhost:8000/v1"
    )
    parser.add_argument(
        "--served-model", metavar="NAME", help="the server's name for the model, if it has several"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the figures as JSON, not the table"
    )
    add_engine_arguments(parser)


def add_number(parser: argparse.ArgumentParser, name: str, default: int, text: str) -> None:
    """Add an option for a whole number."""
    parser.add_argument(
        f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
    )


def run_task(
    args: argparse.Namespace, task: Task, cells: Sequence[Any], rows: Sequence[Any], count: int
) -> int:
    """Ask every system every question.

    Args:
        args: the options.
        task: what the questions are of.
        cells: the questions.
        rows: of the pictures, in order.
        count: questions of each length and row.

    Raises:
        CliError: what the user can put right.
    """
    lengths = parse_lengths(",".join(args.lengths))
    settings = lminf_settings(args)
    systems = chosen_systems(args)
    check_arguments(args, systems)
    from rich.console import Console

    from vllm_lminf.cli.progress import display

    console = Console(stderr=args.json)
    environ = dict(os.environ)
    facts = None
    if not args.url:
        console.print(f"Reading {args.model} ...", highlight=False)
        facts = read_facts(args.model, args.dtype, environ, args.output)
    jobs = {system: asking_job(task, system, args, settings, lengths, facts) for system in systems}
    depend_on = {system: answers_depend_on(job) for system, job in jobs.items()}
    answers = AnswersFile(task, args.output / "answers.jsonl", depend_on)
    failures: dict[System, str] = {}
    with display(console, [LABELS[s] for s in systems], len(cells), "answers") as shown:
        for system, job in jobs.items():
            try:
                ask(task, system, job, cells, answers, environ, args.output, shown.show)
                shown.finish(LABELS[system])
            except CliError as error:
                failures[system] = str(error)
                shown.show(LABELS[system], {"event": "phase", "text": "failed"})
    outcome = Outcome(
        task=task,
        command=args.command_line,
        model=args.model.resolve().name,
        trained_length=facts.trained_length if facts else None,
        settings=depend_on,
        environment=recorded_variables(environ),
        lengths=lengths,
        rows=list(rows),
        count=count,
        shares={s: found for s in systems if (found := shares_of(task, answers, s, cells))},
        failures=failures,
    )
    if outcome.shares:
        publish(outcome, args, console)
    if failures:
        raise CliError("\n".join(f"{LABELS[s]} failed: {text}" for s, text in failures.items()))
    return 0


def chosen_systems(args: argparse.Namespace) -> list[System]:
    """Return the systems that ``--systems`` or ``--url`` names."""
    if args.url:
        return [SERVER]
    return parse_names("--systems", args.systems or "lminf,full", ENGINES)


def lminf_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return LMINF's settings from ``--lminf`` and the options of their own."""
    try:
        settings = json.loads(args.lminf or "{}")
    except ValueError as error:
        raise CliError(f"--lminf {args.lminf}: it is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise CliError(f"--lminf {args.lminf}: it must be an object, such as '{{\"n_global\": 4}}'")
    for name in ("n_local", "middle_top_k"):
        if (value := getattr(args, name)) is not None:
            if name in settings:
                option = name.replace("_", "-")
                raise CliError(f"{name} is given twice: by --{option} and in --lminf")
            settings[name] = value
    return settings


def without_recall(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of plain LMINF."""
    return {k: v for k, v in settings.items() if not k.startswith(RECALL_SETTINGS)}


def settings_of(system: System, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a system's settings of LMINF; None where it runs without."""
    if system == "middle":
        return dict(settings)
    return without_recall(settings) if system == "lminf" else None


def check_arguments(args: argparse.Namespace, systems: Sequence[System]) -> None:
    """Refuse what can be seen to be wrong before anything slow begins; make the output folder."""
    problems = list(problems_of_paths(args.model))
    problems += [
        f"--{name.replace('_', '-')} {value}: it must be 1 or more"
        for name in ("depths", "keys", "samples", "max_num_seqs")
        if (value := getattr(args, name, 1)) < 1
    ]
    if args.url:
        problems += [
            f"--{name.replace('_', '-')} is not for --url: the server has its own"
            for name in ("systems", "n_local", "middle_top_k", "lminf")
            if getattr(args, name) is not None
        ]
    elif args.served_model:
        problems.append("--served-model is for --url alone")
    elif ("middle" in systems) != (args.middle_top_k is not None):
        problems.append("--systems middle and --middle-top-k N, such as 4, go together")
    if problems:
        raise CliError("\n".join(problems))
    make_folder(args.output)


def asking_job(
    task: Task,
    system: System,
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    lengths: Sequence[int],
    facts: ModelFacts | None,
) -> AskingJob:
    """Return the work of one system, no cell in it yet; ``facts`` is None for a server.

    The pool for CPUs has room for every running request, and for one more prompt to stay in the
    prefix cache.
    """
    model, longest = str(args.model.resolve()), max(lengths)
    if facts is None:
        url = api_url(args.url)
        return AskingJob(
            task.name, model, args.max_num_seqs, url=url, served_model=args.served_model
        )
    lminf = settings_of(system, settings)
    overrides: dict[str, int] = {}
    window = None
    if lminf is not None:
        check_settings(lminf, facts.trained_length)
    else:
        overrides = longer_rope(longest, facts.trained_length)
    if system == "window":
        window = read_settings(without_recall(settings)).n_local or facts.trained_length
        if window is None:
            raise CliError("the model's config names no trained length: give --n-local")
        overrides["sliding_window"] = window
    pool_tokens = (args.max_num_seqs + 1) * (longest + EXTRA_BLOCK_TOKENS)
    return AskingJob(
        task.name,
        model,
        args.max_num_seqs,
        dtype=args.dtype,
        compile=args.compile,
        hf_overrides=overrides,
        lminf=lminf,
        window=window,
        kv_cache_bytes=pool_tokens * facts.kv_bytes_per_token,
    )


def answers_depend_on(job: AskingJob) -> dict[str, Any]:
    """Return what a system's answers depend on beside their cells, variables of LMINF included."""
    names = ("model", "dtype", "window", "url", "served_model")
    settings = {name: getattr(job, name) for name in names}
    return settings if job.lminf is None else settings | asdict(read_settings(job.lminf))


def ask(
    task: Task,
    system: System,
    job: AskingJob,
    cells: Sequence[Any],
    answers: AnswersFile,
    environ: Mapping[str, str],
    output: Path,
    show: Callable[[str, Event], None],
) -> None:
    """Ask one system for what it has not answered yet."""
    pending = answers.pending(system, cells)
    if not pending:
        return
    done = len(cells) - len(pending)

    def take(event: Event) -> None:
        nonlocal done
        if event["event"] == "answer":
            answers.add(system, task.cell(*event["cell"]), event["text"])
            done += 1
            event = {"event": "progress", "done": done}
        show(LABELS[system], event)

    run_child(
        "vllm_lminf.cli.retrieval.asking",
        asdict(replace(job, cells=[list(astuple(cell)) for cell in pending])),
        env=engine_environment(environ, lminf=job.lminf is not None),
        log_path=output / f"{system}.log",
        on_event=take,
    )


def shares_of(task: Task, answers: AnswersFile, system: System, cells: Sequence[Any]) -> Shares:
    """Return what a system found at each length and row at which it answered."""
    groups: dict[tuple[int, Any], list[Any]] = {}
    for cell in cells:
        groups.setdefault((cell.length, getattr(cell, task.row)), []).append(cell)
    shares = {place: answers.share(system, group) for place, group in groups.items()}
    return {place: share for place, share in shares.items() if share.asked}


def publish(outcome: Outcome, args: argparse.Namespace, console: Console) -> None:
    """Write the files, and print the table or what ``--json`` asks for."""
    paths = write(outcome, args.output)
    if args.json:
        print(json.dumps(as_data(outcome), indent=2))
    else:
        print_table(console, outcome)
    written = ", ".join(map(str, paths))
    console.print(f"Written: {written}", highlight=False, markup=False, soft_wrap=True)
