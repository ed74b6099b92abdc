"""Measure what LMINF does to a model, beside other attention.

nll, the log-loss of a text, is what is measured where neither is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vllm_lminf.cli import nll
from vllm_lminf.cli.commands import add_commands
from vllm_lminf.cli.passkey import command as passkey
from vllm_lminf.cli.ruler import command as ruler

HELP = "measure a model with LMINF beside other attention: log-loss, passkeys, RULER's tasks"

MEASURES = {"nll": nll, "passkey": passkey, "ruler": ruler}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be measured."""
    add_commands(parser, MEASURES, "MEASURE")


def with_measure(argv: Sequence[str]) -> list[str]:
    """``eval --model ..`` as ``eval nll --model ..``: what it meant while there was no other."""
    words = list(argv)
    if words[:1] == ["eval"] and words[1:2] and words[1].startswith("-"):
        return words if words[1] in ("-h", "--help") else ["eval", "nll", *words[1:]]
    return words
