"""What a request's queries recall from the middle, in plain PyTorch: for the reference kernel.

Every key of the middle is scored exactly; the index that an archive has beside its keys is left
alone.
"""

from dataclasses import dataclass

import torch

from vllm_lminf.kernels.base import LayerConfig, PagedCache, Rotation
from vllm_lminf.kernels.pages import gather, take
from vllm_lminf.kernels.units import best_units
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import rotate

_MAX_SCORES = 2**22
"""So many scores are held at once, unless those of one query are more."""

_MAX_KEYS = 2**14
"""So many keys are taken out of an archive at once."""


def without_rotation(
    key: torch.Tensor, positions: torch.Tensor, rotation: Rotation | None
) -> torch.Tensor:
    """Rotated keys [num_tokens, num_kv_heads, head_size] at the angle of 0, as an archive has them.

    Args:
        key: rotated by ``positions``; what it was multiplied with is left as it is.
        positions: integers [num_tokens].
        rotation: the model's; None where nothing is rotated.
    """
    if rotation is None:
        return key
    cos, sin = rotation.tables(positions)
    return rotate(key, cos, -sin, rotation.is_neox_style)


@dataclass(frozen=True)
class LookingQueries:
    """Those of a request's queries that look and have a middle behind them. They are its latest.

    Attributes:
        query: at the angle of the middle's distance, float32 or wider; [num_queries, num_heads,
            head_size].
        first_position: position of the first of them.
        pattern, middle: what hides keys, and what is recalled of them.
        archive: keys without rotation, and values; in pages.
        pages: [max_pages], the request's row of the table.
    """

    query: torch.Tensor
    first_position: int
    pattern: LambdaPattern
    middle: Middle
    archive: PagedCache
    pages: torch.Tensor

    @classmethod
    def of(
        cls,
        layer: LayerConfig,
        query: torch.Tensor,
        seq_len: int,
        first_row: int,
        archive: PagedCache,
        pages: torch.Tensor,
    ) -> "LookingQueries | None":
        """Of a request's latest queries; None where none looks at anything.

        Args:
            layer: what is computed.
            query: rotated by their positions; [num_queries, num_heads, head_size].
            seq_len: the position after the last of them.
            first_row: the position from which on queries look.
            archive, pages: as above.
        """
        pattern, middle, rotation = layer.pattern, layer.middle, layer.rotation
        # The first query that has a middle is at n_global + n_local.
        first = max(first_row, pattern.n_global + pattern.n_local, seq_len - len(query))
        if middle is None:
            raise ValueError("the kernel was made for a layer that recalls nothing")
        if middle.top_k == 0 or first >= seq_len:
            return None
        wide = torch.promote_types(query.dtype, torch.float32)
        query = query[len(query) - (seq_len - first) :].to(wide)
        if rotation is not None:
            turn = middle.distance - torch.arange(first, seq_len, device=query.device)
            cos, sin = rotation.tables(turn.abs())
            query = rotate(query, cos, turn.sign()[:, None] * sin, rotation.is_neox_style)
        return cls(query, first, pattern, middle, archive, pages)

    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The positions [start, stop) that look, cut into pieces that `recalled` can take."""
        start = max(start, self.first_position)
        num_scores = self.query.shape[1] * max(1, len(self.pattern.middle(stop - 1)))
        size = max(1, _MAX_SCORES // num_scores)
        return [(each, min(each + size, stop)) for each in range(start, stop, size)]

    def recalled(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the queries at [start, stop) recall between them.

        Returns:
            The products of these keys with the queries, and for every product whether this head of
            this query recalls that key: each [num_queries, num_kv_heads, group, num_keys]; and the
            keys' values: [num_kv_heads, num_keys, head_size].
        """
        keys = self.pattern.middle(stop - 1)
        num_kv_heads = self.archive.key.shape[1]
        rows = slice(start - self.first_position, stop - self.first_position)
        query = self.query[rows].unflatten(1, (num_kv_heads, -1)).movedim(0, 2)
        products = torch.cat(
            [
                self._products(query, chunk, min(chunk + _MAX_KEYS, keys.stop))
                for chunk in range(keys.start, keys.stop, _MAX_KEYS)
            ],
            dim=-1,
        )
        position = torch.arange(start, stop, device=query.device)[:, None]
        key_position = torch.arange(keys.start, keys.stop, device=query.device)
        looking = key_position <= position - self.pattern.n_local
        best = best_units(
            products.flatten(0, 1), looking, self.middle, query.shape[1], keys.start
        ).view_as(products)
        (any_recalls,) = best.flatten(0, 2).any(dim=0).nonzero(as_tuple=True)
        value = take(self.archive.value, self.pages, keys.start + any_recalls)
        products, best = (x[..., any_recalls].movedim(2, 0) for x in (products, best))
        return products, best, value

    def _products(self, query: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Of queries [num_kv_heads, group, num_queries, head_size] and the keys at [start, stop);
        [num_kv_heads, group, num_queries, stop - start]."""
        key = gather(self.archive.key, self.pages, start, stop).to(query.dtype)
        # Heads that share a key head are folded into the rows, so that no key is repeated.
        return (query.flatten(1, 2) @ key.transpose(1, 2)).unflatten(1, query.shape[1:3])
