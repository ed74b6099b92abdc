"""Sizes and lengths as they are typed and shown."""

from argparse import ArgumentTypeError

import pytest

from vllm_lminf.cli.quantities import memory, shown_bytes, tokens


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), ("131072", 131072), ("128K", 131072), ("1k", 1000), ("1.5m", 1_500_000)],
)
def test_tokens(text: str, number: int) -> None:
    assert tokens(text) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "8 thousand", "1KiB"])
def test_no_tokens(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="such as 131072"):
        tokens(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [("40GiB", 40 << 30), ("40G", 40 << 30), ("2GB", 2 * 10**9), ("0.5 MiB", 1 << 19), ("7", 7)],
)
def test_memory(text: str, number: int) -> None:
    assert memory(text) == number


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "40 apples", "GiB"])
def test_no_memory(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="such as 40GiB"):
        memory(text)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (40 << 30, "40.0 GiB"),
        (276 << 20, "276 MiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_shown(number: int, shown: str) -> None:
    assert shown_bytes(number) == shown
