"""The one exception that the command line turns into a message and an exit status."""

from __future__ import annotations


class CliError(Exception):
    """Something the user can act on; its text is shown as it is, without a traceback."""
