"""Which lengths ``vllm-lminf eval`` measures, in tokens."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_lminf.errors import CliError

SHARES_OF_TRAINED = (0.25, 0.5, 1.0, 1.5, 2.0)
"""Default lengths as shares of the trained length.

Full attention's time grows with the square of the longest: twice the trained length shows what
happens past it and takes minutes on a small CPU machine.
"""

SHORTEST = 16


def parse_lengths(text: str) -> list[int]:
    """Return the lengths in ``2048,4096``, ascending and each once."""
    try:
        lengths = sorted({int(item) for item in text.split(",")})
    except ValueError:
        raise CliError(
            f"--lengths {text}: give whole numbers of tokens with commas between them, "
            "such as 2048,4096,8192"
        ) from None
    if lengths[0] < SHORTEST:
        raise CliError(f"--lengths {text}: {lengths[0]} is too short, {SHORTEST} is the least")
    return lengths


def choose_lengths(
    asked: Sequence[int] | None, *, trained_length: int | None, text_tokens: int
) -> list[int]:
    """Return the lengths to measure.

    Lengths that were asked for are taken or refused as a whole. Without any, it is the shares of
    the trained length that the text is long enough for.
    """
    if asked:
        if asked[-1] > text_tokens:
            raise CliError(
                f"the text has {text_tokens} tokens, {asked[-1]} were asked for in --lengths: "
                "give a longer text or smaller lengths"
            )
        return list(asked)
    if trained_length is None:
        raise CliError("the model's config names no trained length: give --lengths")
    lengths = [int(share * trained_length) for share in SHARES_OF_TRAINED]
    held = [length for length in lengths if length <= text_tokens]
    if not held:
        raise CliError(
            f"the text has {text_tokens} tokens, too few for the shortest default length, "
            f"{lengths[0]}: give a longer text or --lengths"
        )
    return held
