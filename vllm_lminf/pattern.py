"""The Λ in integers: which keys a query sees, at which distance, and which KV blocks that needs.

Everything here follows from two lines (arXiv 2308.16137, section 3), for a query at absolute
position ``i`` and a key at ``j <= i``, both 0-based::

    visible(i, j)  =  j < n_global  or  i - j < n_local
    distance(i, j) =  min(i - j, distance_limit)

The window holds ``n_local`` keys, the query's own included.
"""

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


@dataclass(frozen=True)
class LambdaPattern:
    """One Λ: a global prefix, a local window, a limit on scored distances. All in tokens, and none
    above `MAX_POSITION`.

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

    def visible(self, i: int, j: int) -> bool:
        """Whether the query at position ``i`` sees the key at position ``j``."""
        return j <= i and (j < self.n_global or i - j < self.n_local)

    def distance(self, i: int, j: int) -> int:
        """The distance at which the query at ``i`` scores a visible key at ``j``."""
        return min(i - j, self.distance_limit)

    def union(self, other: "LambdaPattern") -> "LambdaPattern":
        """The smallest Λ under which all is visible that is visible under either."""
        return LambdaPattern(
            max(self.n_global, other.n_global),
            max(self.n_local, other.n_local),
            max(self.distance_limit, other.distance_limit),
        )

    def window_start(self, i: int) -> int:
        """The first position inside the window of the query at ``i``.

        Example: ``n_local=4``; the query at 9 has the window [6, 7, 8, 9], so this is 6.
        """
        return max(0, i - self.n_local + 1)

    def num_pinned_blocks(self, block_size: int) -> int:
        """How many leading blocks hold a global token and so are never freed."""
        return cdiv(self.n_global, block_size)

    def freed_blocks(
        self, num_computed_tokens: int, block_size: int, extra_retained_tokens: int = 0
    ) -> range:
        """The blocks that no later query can see, once ``num_computed_tokens`` are computed.

        Half-open, and empty when nothing may go. A block ``b`` is in it when it is not pinned and
        ``(b + 1) * block_size <= num_computed_tokens - n_local + 1``: the next query, at position
        ``num_computed_tokens``, is the one that reaches back furthest.

        Example: ``n_global=3, n_local=4, block_size=2``, 11 tokens computed. The next query is at
        11 and its window starts at 8, so blocks 0 to 3 are behind it; 0 and 1 hold the global
        tokens 0, 1, 2 and stay: ``range(2, 4)``.

        Args:
            num_computed_tokens: tokens whose keys are in the cache and settled.
            block_size: tokens in a block.
            extra_retained_tokens: tokens kept below the window, for a caller that may step back.
        """
        window_start = self.window_start(num_computed_tokens) - extra_retained_tokens
        first = self.num_pinned_blocks(block_size)
        return range(first, max(first, window_start // block_size))

    def max_blocks_held(
        self,
        block_size: int,
        max_in_flight_tokens: int,
        max_model_len: int,
        extra_retained_tokens: int = 0,
    ) -> int:
        """The most blocks that one request ever holds, whatever its length.

        Pool sizing, the admission gate and the allocator all use this number. It is the pinned
        blocks, the window behind the first token in flight, the tokens in flight, and one block
        because a window need not start where a block starts.

        Args:
            block_size: tokens in a block.
            max_in_flight_tokens: most tokens that are scheduled and not yet settled.
            max_model_len: longest sequence; a request never needs more blocks than that takes.
            extra_retained_tokens: tokens kept below the window.
        """
        moving = self.n_local - 1 + extra_retained_tokens + max_in_flight_tokens
        held = self.num_pinned_blocks(block_size) + cdiv(moving, block_size) + 1
        return min(held, cdiv(max_model_len, block_size))
