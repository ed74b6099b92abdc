"""Score a text with full attention and with LMINF, side by side, at growing lengths.

Each engine is a real vLLM engine in a process of its own, one after the other. Every token of the
text is scored once; after each length a few tokens are generated. With --url a server that is
running scores it instead, which tells no speed and no memory. Written to the output folder:
lminf.png, results.json, the engines' logs, and what each has measured (full.json and so on), which
the same command doesn't measure again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_lminf.cli.child import run_child
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
    recorded_variables,
)
from vllm_lminf.cli.lengths import choose_lengths, parse_lengths
from vllm_lminf.cli.model_facts import ModelFacts
from vllm_lminf.cli.report import (
    LABELS,
    Evaluation,
    print_table,
    serve_command,
    write_results,
)
from vllm_lminf.cli.scoring_job import (
    ENGINE_NAMES,
    SERVER,
    EngineName,
    ScoringJob,
    ScoringResult,
)
from vllm_lminf.errors import CliError

HELP = "score a long text with full attention and with LMINF, side by side"

SETTINGS = ("n_global", "n_local", "distance_limit")

EXTRA_POOL = 1.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eval nll``."""
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file to score")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    parser.add_argument(
        "--lengths",
        help="tokens, with commas between (default: 1/4, 1/2, 1, 3/2 and 2 times the trained "
        "length, as far as the text goes)",
    )
    parser.add_argument(
        "--engines",
        help=f"which to run, in order (default: {','.join(ENGINE_NAMES)})",
    )
    for name, text in (
        ("n-global", "first tokens that stay visible"),
        ("n-local", "tokens in the window, a token's own included"),
        ("distance-limit", "no pair is scored further apart, in tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"LMINF setting: {text}")
    add_engine_arguments(parser)
    parser.add_argument(
        "--url",
        help="have this OpenAI-compatible server score, such as http://localhost:8000/v1",
    )
    parser.add_argument(
        "--served-model", metavar="NAME", help="the server's name for the model, if it has several"
    )
    parser.add_argument("--json", action="store_true", help="print results.json, not the table")
    parser.add_argument(
        "--chunk",
        type=int,
        default=2048,
        metavar="N",
        help="tokens prefilled in one step (default: %(default)s)",
    )
    parser.add_argument(
        "--decode-tokens",
        type=int,
        default=16,
        metavar="N",
        help="tokens generated after each length (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the evaluation; raises ``CliError`` for what the user can put right."""
    engines: list[EngineName] = [SERVER]
    if not args.url:
        names = args.engines or ",".join(ENGINE_NAMES)
        engines = parse_names("--engines", names, ENGINE_NAMES)
    asked = parse_lengths(args.lengths) if args.lengths else None
    check_arguments(args)
    from rich.console import Console

    from vllm_lminf.cli.plot import draw
    from vllm_lminf.cli.progress import display

    console = Console(stderr=args.json)
    environ = dict(os.environ)
    console.print(f"Reading {args.model} and {args.text} ...", highlight=False)
    facts = read_facts(args.model, args.dtype, environ, args.output, args.text)
    given = {name: getattr(args, name) for name in SETTINGS}
    settings = {name: value for name, value in given.items() if value is not None}
    if "lminf" in engines:
        check_settings(settings, facts.trained_length)
    lengths = choose_lengths(
        asked, trained_length=facts.trained_length, text_tokens=len(facts.token_ids)
    )
    labels = [LABELS[engine] for engine in engines]
    results: dict[EngineName, ScoringResult] = {}
    again: list[str] = []
    with display(console, labels, max(lengths)) as shown:
        for engine in engines:
            job = scoring_job(engine, args, facts, lengths, settings)
            kept = KeptResult(args.output / f"{engine}.json", job, environ)
            result = kept.read()
            if result is None:
                result = run_engine(job, environ, args.output, shown.show)
                kept.write(result)
            else:
                again.append(str(kept.path))
            results[engine] = result
            shown.finish(LABELS[engine])
    evaluation = Evaluation(
        model=str(args.model),
        text=str(args.text),
        text_tokens=len(facts.token_ids),
        trained_length=facts.trained_length,
        lengths=lengths,
        settings={
            "lminf": settings,
            "dtype": args.dtype,
            "chunk": args.chunk,
            "decode_tokens": args.decode_tokens,
        },
        environment=recorded_variables(environ),
        results=results,
    )
    write_results(evaluation, args.output / "results.json")
    draw(evaluation, args.output / "lminf.png")
    if args.json:
        print((args.output / "results.json").read_text(encoding="utf-8"), end="")
    else:
        print_table(console, evaluation)
    lines = [f"Written: {args.output / 'lminf.png'}, {args.output / 'results.json'}"]
    if again:
        lines.append(f"Measured before: {', '.join(again)}; to measure again, delete these")
    if not args.url:
        lines += ["Serve this model with LMINF:", serve_command(evaluation.model, settings)]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything slow begins; make the output folder."""
    problems = list(problems_of_paths(args.model))
    if not args.text.is_file():
        problems.append(f"--text {args.text}: no such file")
    else:
        try:
            args.text.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            problems.append(f"--text {args.text}: not UTF-8 text")
    if args.chunk < 1:
        problems.append(f"--chunk {args.chunk}: it must be 1 or more")
    if args.url:
        problems += [
            f"--{name.replace('_', '-')} is not for --url: the server has its own"
            for name in ("engines", *SETTINGS)
            if getattr(args, name) is not None
        ]
    elif args.served_model:
        problems.append("--served-model is for --url alone")
    if args.decode_tokens < 2:
        problems.append(f"--decode-tokens {args.decode_tokens}: it must be 2 or more")
    if problems:
        raise CliError("\n".join(problems))
    make_folder(args.output)


def scoring_job(
    engine: EngineName,
    args: argparse.Namespace,
    facts: ModelFacts,
    lengths: Sequence[int],
    settings: dict[str, int],
) -> ScoringJob:
    """Return the work of one engine.

    The pool has room for the whole text and for every decode request's own blocks, so that nothing
    is evicted.
    """
    longest = max(lengths)
    end = longest + args.decode_tokens
    pool_tokens = int(longest * EXTRA_POOL) + len(lengths) * (
        args.decode_tokens + EXTRA_BLOCK_TOKENS
    )
    return ScoringJob(
        engine=engine,
        model=str(args.model),
        dtype=args.dtype,
        token_ids=facts.token_ids[:longest],
        lengths=list(lengths),
        chunk=args.chunk,
        decode_tokens=args.decode_tokens,
        kv_cache_bytes=pool_tokens * facts.kv_bytes_per_token,
        compile=args.compile,
        hf_overrides=longer_rope(end, facts.trained_length) if engine == "full" else {},
        lminf=settings if engine == "lminf" else {},
        url=api_url(args.url) if args.url else None,
        served_model=args.served_model,
    )


class KeptResult:
    """What an engine measured, in a file, from which a run goes on.

    Args:
        path: of the file.
        job: what it is asked.
        environ: variables of it change the figures.
    """

    def __init__(self, path: Path, job: ScoringJob, environ: Mapping[str, str]) -> None:
        self.path = path
        text = json.dumps(job.token_ids).encode()
        asked = {**asdict(job), "token_ids": hashlib.sha256(text).hexdigest()}
        self._asked = {"job": asked, "environment": recorded_variables(environ)}

    def read(self) -> ScoringResult | None:
        """Return the result, or None where there is none of this very job."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["asked"] == json.loads(json.dumps(self._asked)):
                return ScoringResult.from_json(data["result"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None

    def write(self, result: ScoringResult) -> None:
        """Keep it."""
        data = {"asked": self._asked, "result": asdict(result)}
        self.path.write_text(json.dumps(data) + "\n", encoding="utf-8")


def run_engine(job: ScoringJob, environ: dict[str, str], output: Path, show: Any) -> ScoringResult:
    """Run one engine to its end and return what it measured."""
    label = LABELS[job.engine]
    try:
        data = run_child(
            f"vllm_lminf.cli.{'scoring' if job.url is None else 'remote_scoring'}",
            asdict(job),
            env=engine_environment(environ, lminf=job.engine == "lminf"),
            log_path=output / f"{job.engine}.log",
            on_event=lambda event: show(label, event),
        )
    except CliError as error:
        raise CliError(f"the {label} engine stopped: {error}") from None
    return ScoringResult.from_json(data)
