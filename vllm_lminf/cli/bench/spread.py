"""Ratios of measurements that took turns, and how far they spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """The spread of the ratios of each round: what drifts from round to round cancels out."""
        return cls.of([a / b for a, b in zip(numerators, denominators, strict=True)])

    def text(self, decimals: int) -> str:
        """The median, and the quartiles in brackets."""
        median, low, high = (f"{v:.{decimals}f}" for v in (self.median, self.low, self.high))
        return f"{median} ({low}–{high})"

    def __str__(self) -> str:
        return self.text(2 if self.median < 10 else 1)
