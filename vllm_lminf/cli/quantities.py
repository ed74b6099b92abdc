"""Numbers of tokens and of bytes as people write them, and as they read them."""

from __future__ import annotations

import argparse
import re

_TOKENS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
"""As vLLM reads them: 1k is 1000, 1K is 1024."""

_BYTES = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000 ** (n + 1) for n, letter in enumerate("kmgt")},
    **{f"{letter}{end}": 1024 ** (n + 1) for n, letter in enumerate("kmgt") for end in ("", "ib")},
}

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def tokens(text: str) -> int:
    """Return the number in ``131072``, ``128K`` or ``1m``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", text.strip())
    number = float(found[1]) * _TOKENS[found[2]] if found else 0
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of tokens: give one such as 131072, 128K (of 1024) or 1m"
        )
    return int(number)


def memory(text: str) -> int:
    """Return the bytes in ``40GiB``, ``40G`` (the same), ``40GB`` (of 1000) or ``42949672960``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = found[2].lower() if found else "?"
    if found is None or unit not in _BYTES or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give one such as 40GiB")
    return int(float(found[1]) * _BYTES[unit])


def shown_bytes(number: int) -> str:
    """Return a size in the unit in which it is at least 1, with three digits."""
    size = float(number)
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    digits = 0 if unit == "B" or size >= 100 else 1 if size >= 10 else 2
    return f"{size:.{digits}f} {unit}"
