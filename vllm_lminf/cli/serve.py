"""Run `vllm serve` with LMINF: everything but the settings below is passed on unchanged.

The command that runs is printed first; --print-command does no more than that. It takes this
process's place, so that signals and the exit status are vLLM's own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_lminf.cli import metadata_shim
from vllm_lminf.cli.engines import read_settings, reason_for_exclusion
from vllm_lminf.cli.settings import add_setting_arguments, option, settings_given
from vllm_lminf.errors import CliError
from vllm_lminf.plugin.config import (
    BACKEND_NAME,
    BACKEND_VARIABLE,
    SECTION,
    VARIABLES,
    is_backend_name,
)

HELP = "run `vllm serve` with LMINF, and pass everything else on"

PASSES_ON = True

_ADDITIONAL = "--additional-config"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``serve``."""
    parser.usage = "vllm-lminf serve MODEL [setting of LMINF ...] [option of vllm serve ...]"
    parser.add_argument(
        "--print-command", action="store_true", help="print the command, and don't run it"
    )
    add_setting_arguments(parser, leave_out=())
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Become ``vllm serve``; raises ``CliError`` where it would not run with LMINF."""
    settings = settings_given(args)
    words = list(args.passed_on)
    if not words:
        raise CliError("which model? Type: vllm-lminf serve MODEL [options]")
    read_settings(settings)
    check(settings, words, os.environ)
    variables = {BACKEND_VARIABLE: BACKEND_NAME}
    variables |= {VARIABLES[name]: str(value) for name, value in settings.items()}
    command = ["vllm", "serve", *words]
    shown = " ".join(
        [*(f"{k}={shlex.quote(v)}" for k, v in variables.items()), shlex.join(command)]
    )
    if not args.print_command:
        executable = find_vllm()
        print(shown, file=sys.stderr, flush=True)
        os.execve(executable, command, {**os.environ, **variables})
    print(shown)
    return 0


def check(settings: Mapping[str, Any], words: Sequence[str], environ: Mapping[str, str]) -> None:
    """Refuse what would have the server run without LMINF, or without a setting that was given."""
    problems = []
    before = environ.get(BACKEND_VARIABLE)
    if before is not None and not is_backend_name(before):
        problems.append(
            f"{BACKEND_VARIABLE} is {before!r}: unset it, or type `vllm serve` to run without "
            f"{BACKEND_NAME}"
        )
    if (reason := reason_for_exclusion(environ)) is not None:
        problems.append(f"{reason[0]}: {reason[1]}")
    problems += [
        f"{name} is given twice: by --{option(name)} and in {_ADDITIONAL}; keep one"
        for name in settings.keys() & section_of(words).keys()
    ]
    if problems:
        raise CliError("\n".join(problems))


def section_of(words: Sequence[str]) -> dict[str, Any]:
    """Return the settings of LMINF that options of vLLM's give; what is no such object is left to
    vLLM to judge.
    """
    found: dict[str, Any] = {}
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        text = value if equals else "".join(words[number + 1 : number + 2])
        if name == _ADDITIONAL:
            try:
                found |= json.loads(text)[SECTION]
            except (ValueError, KeyError, TypeError):
                continue
        elif name.startswith(f"{_ADDITIONAL}.{SECTION}."):
            found[word.partition("=")[0].rpartition(".")[2]] = text
    return found


def find_vllm() -> str:
    """Return the path of the command ``vllm`` that belongs to this Python, or else of any."""
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("vllm")
    if found is None:
        raise CliError("there is no command `vllm` here; type: vllm-lminf doctor")
    if metadata_shim.is_missing():
        raise CliError(
            "the command `vllm` dies here for want of its package's metadata; type: vllm-lminf "
            "doctor --fix"
        )
    return found
