"""LMINF's settings as options of a command line: each by its own name."""

from __future__ import annotations

import argparse
from typing import Any

from vllm_lminf.plugin.config import ALLOWED, parse_value


def add_setting_arguments(parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...]) -> None:
    """Add an option for each setting but those that are left out."""
    group = parser.add_argument_group("settings of LMINF")
    for name, allowed in ALLOWED.items():
        if name not in leave_out:
            metavar = "GIB" if name == "archive_gib" else "NAME" if name == "kernel" else "N"
            group.add_argument(
                f"--{option(name)}", metavar=metavar, help=allowed.replace("%", "%%")
            )


def option(name: str) -> str:
    """Return what a setting is called as an option, without hyphens before it."""
    return name.replace("_", "-")


def settings_given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings whose options were given, by their names."""
    words = {name: getattr(args, name, None) for name in ALLOWED}
    return {name: parse_value(name, text) for name, text in words.items() if isinstance(text, str)}
