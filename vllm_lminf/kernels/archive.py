"""The archive: keys and values of all positions of a request, kept in pages, to be recalled from.

A page has as many positions as a block of the cache, and a request's pages are found through a
block table of their own. Keys lie there without their rotation, since they are recalled at one
distance whatever their own. Beside them stands an index: quantised keys, which are scanned to find
the few that must be scored exactly.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ArchiveFormat:
    """What a page holds, one part after the other, H key heads of size D and pages of B positions::

        keys     [H, B, D]               without rotation
        values   [H, B, D]
        codes    [H, B * D * bits / 8]   bytes, in an order of the kernel's own
        scales   [H, B]                  float32
        radii    [H, B]                  float32
        centres  [H, D]                  float32

    A key is its page's centre, and its codes times its scale, and a rest; the radius bounds the
    rest. A page's last four parts are there once its last position is written: a middle begins a
    window behind, where pages are full.

    Attributes:
        num_kv_heads: H.
        head_size: D; a multiple of 16.
        block_size: B; a multiple of 16, so that every part is aligned to 64 bytes.
        dtype: of keys and values.
        index_bits: of an element of the index.
    """

    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    index_bits: int = 8

    @property
    def index_bytes(self) -> int:
        """Of a page's index: codes, scales, radii and centres."""
        a_key = self.head_size * self.index_bits // 8 + 2 * torch.float32.itemsize
        centre = self.head_size * torch.float32.itemsize
        return self.num_kv_heads * (self.block_size * a_key + centre)

    @property
    def kept_bytes(self) -> int:
        """Of a page's keys, and as many again of its values."""
        return self.num_kv_heads * self.block_size * self.head_size * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Of a page."""
        return 2 * self.kept_bytes + self.index_bytes

    def kept(self, archive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and the values in an archive, as views.

        Args:
            archive: uint8 [num_pages, page_bytes].

        Returns:
            Each [num_pages, num_kv_heads, block_size, head_size].
        """
        shape = self.num_kv_heads, self.block_size, self.head_size
        size = self.kept_bytes
        parts = archive[:, :size], archive[:, size : 2 * size]
        key, value = (part.view(self.dtype).unflatten(1, shape) for part in parts)
        return key, value


@dataclass(frozen=True)
class RecallBatch:
    """Where a step's requests have their pages, and which of their queries recall. All of it lies
    where the kernel reads it.

    Attributes:
        block_table: int32 [num_requests, max_pages]: page ``b`` of a request holds its positions
            ``[b * block_size, (b + 1) * block_size)``.
        slot_mapping: int64 [num_tokens]: ``page * block_size + offset`` of this step's tokens, or a
            negative number for a token that isn't kept.
        first_rows: int32 [num_requests]: the position from which on a request's queries recall, see
            `vllm_lminf.middle.Middle.first_row`.
    """

    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    first_rows: torch.Tensor
