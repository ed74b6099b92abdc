"""Which keys a query sees, at which distance, and which KV blocks that needs: in integers.

A policy is stated once, by `Pattern.intervals`: for a query, stretches of positions, each with the
distances at which its keys are scored. What may be freed, what a prefix-cache hit needs and the
bound on what a request holds are derived from that here, and the reference kernels visit the same
stretches.

The policy of this project is the Λ (arXiv 2308.16137, section 3): `LambdaPattern`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

MAX_POSITION = 2**31 - 1
"""Largest position that there is: rotations are exact up to it, and kernels count in int32."""


def shown(value: object) -> str:
    """A value as a message shows it."""
    try:
        text = repr(value)
    except ValueError:  # Python doesn't write integers of some thousand digits.
        return f"too large to be shown ({type(value).__name__})"
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up, for integers."""
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class Interval:
    """Consecutive positions that a query sees, and the distances at which it scores their keys.

    A key's distance counts as no less than ``min_distance`` and no more than ``max_distance``.
    Left out, they leave it as it is; equal, they put all keys of the interval at one distance.

    Attributes:
        start: the first position.
        stop: the position after the last one; equal to ``start`` where there is none.
    """

    start: int
    stop: int
    min_distance: int = 0
    max_distance: int = MAX_POSITION

    @property
    def positions(self) -> range:
        return range(self.start, self.stop)

    def distance(self, i: int, j: int) -> int:
        """The distance at which the query at ``i`` scores the key at ``j``, which is in here."""
        return min(max(i - j, self.min_distance), self.max_distance)


class Pattern(ABC):
    """A policy: what a query sees, and what a request keeps.

    A subclass states `intervals` (and `kept`, if it isn't the same); all else follows. Two things
    must hold of it: what a query doesn't see and a request doesn't keep, no later query sees; and
    an interval, once there, doesn't get shorter.
    """

    @abstractmethod
    def intervals(self, i: int) -> tuple[Interval, ...]:
        """What the query at position ``i`` sees: in order, disjoint, the last one ending at ``i``.
        Their number doesn't depend on ``i``; some may be empty."""

    def kept(self, num_computed_tokens: int) -> tuple[Interval, ...]:
        """What a request keeps in its blocks once so many tokens are computed: what the next query
        sees, which is at that position. It differs where some of that is kept elsewhere."""
        return self.intervals(num_computed_tokens)

    def visible(self, i: int, j: int) -> bool:
        """Whether the query at position ``i`` sees the key at position ``j``."""
        return any(j in interval.positions for interval in self.intervals(i))

    def distance(self, i: int, j: int) -> int:
        """The distance at which the query at ``i`` scores a visible key at ``j``."""
        (distance,) = (
            interval.distance(i, j) for interval in self.intervals(i) if j in interval.positions
        )
        return distance

    def num_pinned_blocks(self, block_size: int) -> int:
        """How many leading blocks are never freed."""
        first = self.kept(MAX_POSITION)[0]
        return cdiv(first.stop, block_size) if first.start == 0 else 0

    def freed_blocks(
        self, num_computed_tokens: int, block_size: int, extra_retained_tokens: int = 0
    ) -> tuple[range, ...]:
        """The blocks that hold nothing of what is kept, once so many tokens are computed: those
        between two intervals, in order, none of them empty.

        Example: blocks of 2 tokens; kept are the positions [0, 3) and [8, 12). Blocks 2 and 3 hold
        the positions 4 to 7: ``(range(2, 4),)``.

        Args:
            num_computed_tokens: tokens whose keys are in the cache and settled.
            block_size: tokens in a block.
            extra_retained_tokens: by how much the caller may step back, so that the next query is
                that much earlier.
        """
        gaps = []
        stop = 0
        for interval in self.kept(max(0, num_computed_tokens - extra_retained_tokens)):
            if interval.positions:
                gap = range(cdiv(stop, block_size), interval.start // block_size)
                if gap:
                    gaps.append(gap)
                stop = interval.stop
        return tuple(gaps)

    def kept_blocks(
        self,
        num_computed_tokens: int,
        block_size: int,
        num_blocks: int,
        extra_retained_tokens: int = 0,
    ) -> list[range]:
        """Of a sequence's first ``num_blocks`` blocks those that `freed_blocks` leaves, in order;
        some of the ranges may be empty."""
        kept = []
        start = 0
        for gap in self.freed_blocks(num_computed_tokens, block_size, extra_retained_tokens):
            kept.append(range(start, min(gap.start, num_blocks)))
            start = gap.stop
        return [*kept, range(start, num_blocks)]

    def max_blocks_held(
        self,
        block_size: int,
        max_in_flight_tokens: int,
        max_model_len: int,
        extra_retained_tokens: int = 0,
    ) -> int:
        """The most blocks that one request ever holds, whatever its length.

        Pool sizing, the admission gate and the allocator all use this number. It is what the last
        token's intervals take, and the last interval grows by the tokens in flight. One that
        doesn't start where a sequence does takes one block more, because it need not start where a
        block starts.

        Args:
            block_size: tokens in a block.
            max_in_flight_tokens: most tokens that are scheduled and not yet settled.
            max_model_len: longest sequence; a request never needs more blocks than that takes.
            extra_retained_tokens: by how much the caller may step back; see `freed_blocks`.
        """
        *others, last = self.kept(max_model_len - 1)
        held = sum(
            cdiv(len(each.positions), block_size) + (each.start > 0)
            for each in others
            if each.positions
        )
        # The query is one of the tokens in flight.
        moving = len(last.positions) - 1 + extra_retained_tokens + max_in_flight_tokens
        held += cdiv(moving, block_size) + 1
        return min(held, cdiv(max_model_len, block_size))


def num_seen(patterns: Iterable[Pattern], num_computed_tokens: int) -> int:
    """How many of the computed tokens the next query sees under one of these patterns at least."""
    seen = sorted(
        (interval.start, min(interval.stop, num_computed_tokens))
        for pattern in patterns
        for interval in pattern.intervals(num_computed_tokens)
    )
    count = end = 0
    for start, stop in seen:
        count += max(0, stop - max(start, end))
        end = max(end, stop)
    return count


@dataclass(frozen=True)
class LambdaPattern(Pattern):
    """One Λ: a global prefix, a local window, a limit on scored distances. All in tokens, and none
    above `MAX_POSITION`.

    For a query at absolute position ``i`` and a key at ``j <= i``, both 0-based::

        visible(i, j)  =  j < n_global  or  i - j < n_local
        distance(i, j) =  min(i - j, distance_limit)

    The window holds ``n_local`` keys, the query's own included.

    Attributes:
        n_global: how many of the first tokens every token sees; 0 is a plain sliding window.
        n_local: how many of the latest tokens a token sees, itself included.
        distance_limit: no pair is scored at a larger distance; at least ``n_local``.
    """

    n_global: int
    n_local: int
    distance_limit: int

    def __post_init__(self) -> None:
        for name, minimum in (("n_global", 0), ("n_local", 1), ("distance_limit", 1)):
            value = getattr(self, name)
            if value < minimum:
                raise ValueError(f"{name} is {value}: it must be {minimum} or more")
            if value > MAX_POSITION:
                raise ValueError(f"{name} is beyond {MAX_POSITION}, the largest position")
        if self.distance_limit < self.n_local:
            raise ValueError(
                f"distance_limit is {self.distance_limit}, below n_local, which is "
                f"{self.n_local}: it must be n_local or more, or keys inside the window would be "
                "scored at a distance that is not theirs"
            )

    def intervals(self, i: int) -> tuple[Interval, Interval]:
        """The global tokens behind the window, and the window.

        Example: ``n_global=3, n_local=4, distance_limit=6``. The query at 9 sees [0, 3), which are
        7 to 9 tokens away and count as 6, and [6, 10).
        """
        window_start = self.window_start(i)
        return (
            Interval(0, min(self.n_global, window_start), max_distance=self.distance_limit),
            Interval(window_start, i + 1),
        )

    def window_start(self, i: int) -> int:
        """The first position inside the window of the query at ``i``.

        Example: ``n_local=4``; the query at 9 has the window [6, 7, 8, 9], so this is 6.
        """
        return max(0, i - self.n_local + 1)

    def middle(self, i: int) -> range:
        """The positions that the query at ``i`` has behind it and doesn't see:
        ``n_global <= j <= i - n_local``.

        Example: ``n_global=3, n_local=4``; the query at 9 doesn't see [3, 4, 5].
        """
        window_start = self.window_start(i)
        return range(min(self.n_global, window_start), window_start)

    def freed_blocks(
        self, num_computed_tokens: int, block_size: int, extra_retained_tokens: int = 0
    ) -> tuple[range, ...]:
        """As derived from the intervals, in closed form: it is asked at every step of every
        request. A block ``b`` is in it when it holds no global token and
        ``(b + 1) * block_size <= num_computed_tokens - n_local + 1``."""
        stop = (num_computed_tokens - extra_retained_tokens - self.n_local + 1) // block_size
        first = -(-self.n_global // block_size)
        return (range(first, stop),) if first < stop else ()

    def union(self, other: "LambdaPattern") -> "LambdaPattern":
        """The smallest Λ under which all is visible that is visible under either."""
        return LambdaPattern(
            max(self.n_global, other.n_global),
            max(self.n_local, other.n_local),
            max(self.distance_limit, other.distance_limit),
        )
