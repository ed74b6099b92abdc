"""Entry point of ``vllm-lminf``: reads the arguments and hands over to a subcommand.

A subcommand is a module with ``HELP``, ``add_arguments(parser)`` and ``run(args)``. These modules
import only the standard library at their top, so that ``--help`` answers at once and needs no
vLLM.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from vllm_lminf import __version__
from vllm_lminf.cli import doctor as doctor_command
from vllm_lminf.cli import eval as eval_command
from vllm_lminf.errors import CliError

COMMANDS: dict[str, ModuleType] = {
    "eval": eval_command,
    "doctor": doctor_command,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every subcommand added."""
    parser = argparse.ArgumentParser(
        prog="vllm-lminf",
        description="LM-Infinite attention for vLLM: measure what it does to your model.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.HELP,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 refused, 130 interrupted."""
    args = build_parser().parse_args(argv)
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
