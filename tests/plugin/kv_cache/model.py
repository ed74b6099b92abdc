"""What a request must hold, from the definition of the Λ alone: no code of the package is used."""

from dataclasses import dataclass
from functools import cache
from math import ceil


@dataclass(frozen=True)
class Layers:
    """Layers that share a table of blocks. A window of a model's own has no global token."""

    n_global: int
    n_local: int
    block_size: int

    def visible(self, first: int, last: int) -> set[int]:
        """The positions that the queries from ``first`` to ``last`` see."""
        window = range(max(0, first - self.n_local + 1), last + 1)
        return {*range(min(self.n_global, last + 1)), *window}

    @cache  # noqa: B019
    def needed(self, block: int, position: int) -> bool:
        """Whether a query at this position or later sees a token of the block, or is one."""
        tokens = range(block * self.block_size, (block + 1) * self.block_size)
        return any(j < self.n_global or position - j < self.n_local for j in tokens)

    def num_blocks(self, num_tokens: int) -> int:
        return ceil(num_tokens / self.block_size)

    def bound(self, in_flight: int, max_length: int) -> int:
        """The most blocks that a request may ever hold: pinned, window and in flight, and one."""
        moving = self.num_blocks(self.n_local - 1 + in_flight) + 1
        return min(self.num_blocks(self.n_global) + moving, self.num_blocks(max_length))


@dataclass(kw_only=True, eq=False)
class Running:
    """A running request: slots it was given, and where the first query is that may still run."""

    num_slots: int
    first_query: int

    def must_hold(self, layers: Layers) -> list[bool]:
        """For every block of the sequence, whether it is held."""
        blocks = range(layers.num_blocks(self.num_slots))
        return [layers.needed(block, self.first_query) for block in blocks]
