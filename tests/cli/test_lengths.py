"""Which lengths are measured, and which are refused."""

import pytest

from vllm_lminf.cli.lengths import choose_lengths, parse_lengths
from vllm_lminf.errors import CliError


def test_parsed_lengths_are_sorted_and_unique() -> None:
    assert parse_lengths("4096, 2048,4096") == [2048, 4096]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("2k", "whole numbers"), ("2048,", "whole numbers"), ("8,2048", "8 is too short")],
)
def test_unusable_lengths_are_refused(text: str, reason: str) -> None:
    with pytest.raises(CliError, match=reason):
        parse_lengths(text)


@pytest.mark.parametrize(
    ("text_tokens", "lengths"),
    [
        (40_000, [2048, 4096, 8192, 12288, 16384]),
        (16_383, [2048, 4096, 8192, 12288]),
        (5_000, [2048, 4096]),
    ],
)
def test_default_lengths_end_with_the_text(text_tokens: int, lengths: list[int]) -> None:
    assert choose_lengths(None, trained_length=8192, text_tokens=text_tokens) == lengths


def test_a_short_text_is_refused_with_its_length() -> None:
    with pytest.raises(CliError, match="has 1500 tokens, 2000 were asked for"):
        choose_lengths([1000, 2000], trained_length=8192, text_tokens=1500)
    with pytest.raises(CliError, match="has 1500 tokens, too few"):
        choose_lengths(None, trained_length=8192, text_tokens=1500)


def test_lengths_must_be_given_without_a_trained_length() -> None:
    with pytest.raises(CliError, match="give --lengths"):
        choose_lengths(None, trained_length=None, text_tokens=1500)
    assert choose_lengths([1500], trained_length=None, text_tokens=1500) == [1500]
