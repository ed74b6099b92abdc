"""The middle recalled: which queries look behind the Λ, and what they bring back, in integers.

LM-Infinite's optional part (arXiv 2308.16137, "re-introducing top-k middle tokens"): some queries,
in deeper layers, also attend to the few keys of the middle that score highest. Which keys those are
depends on the numbers; everything that doesn't is stated here.
"""

from dataclasses import dataclass

from vllm_lminf.pattern import MAX_POSITION, shown

ALL_ROWS = MAX_POSITION
"""As `Middle.rows`: every query looks."""

INDEX_BITS = (8,)
"""Bits an element that the index of an archive can have, see `vllm_lminf.kernels.archive`."""


@dataclass(frozen=True)
class Middle:
    """What queries recall from the middle, which is what a Λ hides of the past:
    `vllm_lminf.pattern.LambdaPattern.middle`.

    A query that looks scores every middle key at one distance, whatever the key's own: order inside
    the middle is lost. It adds the keys of the ``top_k`` best units to the softmax over what it
    sees anyway. Two kinds of unit are in use:

    - ``block_size`` 1, the paper's: a unit is a key, and each query head has its own best ones.
    - ``block_size`` n: a unit is the middle keys among the positions ``[b * n, (b + 1) * n)``, and
      the query heads that share a key head have theirs in common: the same bytes of the key head
      then serve them all. A unit is as good as the best pair of one of its keys and one of these
      heads. A block that the prefix or the window cuts counts with its middle keys alone.

    Of units that are equally good, those at lower positions come first.

    Attributes:
        top_k: units that a query adds; 0 recalls nothing.
        distance: at which middle keys are scored, in tokens.
        rows: how many of the prompt's last queries look, and with them all behind the prompt. The
            paper's code has 1; `ALL_ROWS` has all.
        from_layer: the first layer that recalls, counted from 1.
        block_size: positions of a unit.
    """

    top_k: int
    distance: int
    rows: int
    from_layer: int = 1
    block_size: int = 1

    def __post_init__(self) -> None:
        minimums = {"top_k": 0, "distance": 0, "rows": 1, "from_layer": 1, "block_size": 1}
        if problems := [
            f"{name} is {shown(value)}: it must be {minimum} or more, and {MAX_POSITION} at most"
            for name, minimum in minimums.items()
            if not minimum <= (value := getattr(self, name)) <= MAX_POSITION
        ]:
            raise ValueError("; ".join(problems))

    def recalls(self, layer: int) -> bool:
        """Whether the queries of a layer, counted from 1, look into the middle at all."""
        return self.top_k > 0 and layer >= self.from_layer

    def first_row(self, prompt_len: int) -> int:
        """The position from which on queries look, in a request whose prompt has so many tokens.

        It follows from positions alone, so that no result depends on how a prompt is cut into
        chunks, what else is in a batch, or whether a request was preempted.

        Example: ``rows=2`` and a prompt of 5 tokens: the queries at 3, 4, and all later ones look.
        """
        return max(0, prompt_len - self.rows)
