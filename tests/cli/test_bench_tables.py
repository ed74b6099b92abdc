"""Spreads and tables, whatever is in them."""

import pytest

from vllm_lminf.cli.bench.spread import Spread
from vllm_lminf.cli.bench.tables import Table, significant


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.009161, "0.00916"),
        (0.0999999, "0.100"),
        (0.999999, "1.00"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (402.4, "402"),
        (18432.0, "18400"),
        (0.0, "0"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_spreads() -> None:
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([1.0, 5.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert str(Spread.of_ratios([1.0, 3.0], [2.0, 2.0])) == "1.00 (0.75–1.25)"
    with pytest.raises(ValueError, match="shorter"):
        Spread.of_ratios([1.0, 3.0], [2.0])


def test_markdown() -> None:
    left = Table("left", ("a\nb", "c"), [("1", "2"), ("3", "4")])
    both = left.beside(Table("right", ("a\nb", "d"), [("1", "5"), ("3", "6")]))
    assert both.markdown().splitlines() == [
        "| a b | c | d |",
        "| --- | ---: | ---: |",
        "| 1 | 2 | 5 |",
        "| 3 | 4 | 6 |",
    ]
