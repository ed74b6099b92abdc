"""How the examples take a text file from the command line."""

from argparse import ArgumentTypeError
from pathlib import Path


def text_of(path: str) -> str:
    """Return the text of a file, for `type=` of argparse, which shows what is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentTypeError(
            f"{path}: not UTF-8 text (byte {error.start}); for another encoding: "
            f"iconv -f ENCODING -t UTF-8 {path}"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a path that none can be
        raise ArgumentTypeError(f"{path}: {getattr(error, 'strerror', error)}") from None
    if not text.strip():
        raise ArgumentTypeError(f"{path}: empty")
    return text


def count(text: str) -> int:
    """Return a number of 1 or more, for `type=` of argparse."""
    try:
        value = int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text}: not a whole number") from None
    if value < 1:
        raise ArgumentTypeError(f"{text}: it must be 1 or more")
    return value
