"""Entry point of ``vllm-lminf``: reads the arguments and hands over to a command."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from vllm_lminf import __version__
from vllm_lminf.cli import doctor as doctor_command
from vllm_lminf.cli import eval as eval_command
from vllm_lminf.cli import plan as plan_command
from vllm_lminf.cli import serve as serve_command
from vllm_lminf.cli.commands import add_commands
from vllm_lminf.errors import CliError

COMMANDS = {
    "serve": serve_command,
    "plan": plan_command,
    "eval": eval_command,
    "doctor": doctor_command,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every command added."""
    parser = argparse.ArgumentParser(
        prog="vllm-lminf",
        description="LM-Infinite attention for vLLM: serve, measure, plan, find what is wrong.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add_commands(parser, COMMANDS, "COMMAND")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 refused or failed, 130
    interrupted.
    """
    words = eval_command.with_measure(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args, passed_on = parser.parse_known_args(words)
    args.passed_on, args.words = passed_on, words
    if passed_on and not getattr(COMMANDS[args.command], "PASSES_ON", False):
        parser.error(f"unrecognized arguments: {' '.join(passed_on)}")
    args.command_line = shlex.join(["vllm-lminf", *words])
    try:
        status: int = args.run(args)
    except CliError as error:
        print(f"vllm-lminf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vllm-lminf: interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
