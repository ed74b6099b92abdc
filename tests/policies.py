"""Policies that the package doesn't have: what it takes to add one, and that nothing else must
change for the block manager and the oracle to follow it."""

from dataclasses import dataclass

from vllm_lminf.pattern import Interval, LambdaPattern, Pattern


@dataclass(frozen=True)
class WithMiddle(Pattern):
    """A Λ, and a stretch of the middle at one distance.

    Attributes:
        around: the Λ.
        middle: positions between the global tokens and any window that has left them behind.
        at: the distance at which they are scored, whatever their own.
    """

    around: LambdaPattern
    middle: range
    at: int

    def intervals(self, i: int) -> tuple[Interval, ...]:
        first, window = self.around.intervals(i)
        stop = min(self.middle.stop, window.start)
        middle = Interval(min(self.middle.start, stop), stop, self.at, self.at)
        return first, middle, window


@dataclass(frozen=True)
class WithMiddleElsewhere(WithMiddle):
    """The same to a query; but the middle is kept in some other place than the request's blocks."""

    def kept(self, num_computed_tokens: int) -> tuple[Interval, ...]:
        return self.around.intervals(num_computed_tokens)
