"""Commands, and commands of commands: each a module with ``HELP`` and ``add_arguments(parser)``.

One that hands options of vLLM's on has a true ``PASSES_ON``: what its parser doesn't know is then
left in ``passed_on``, in the order given.

What ``add_arguments`` leaves in the parser's default ``run`` is called with the parsed arguments
and returns the exit status. These modules import only the standard library at their top, so that
``--help`` answers at once and needs no vLLM.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import ModuleType


def add_commands(
    parser: argparse.ArgumentParser, commands: Mapping[str, ModuleType], metavar: str
) -> None:
    """Give a parser a subparser for every command, of which one must be named."""
    subparsers = parser.add_subparsers(dest=metavar.lower(), required=True, metavar=metavar)
    for name, command in commands.items():
        command.add_arguments(
            subparsers.add_parser(
                name,
                help=command.HELP,
                description=command.__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                # An option of vLLM's may begin as one of ours does.
                allow_abbrev=not getattr(command, "PASSES_ON", False),
            )
        )
