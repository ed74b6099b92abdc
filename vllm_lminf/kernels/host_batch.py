"""A batch on the host, and its inverse rotations: for kernels that read lengths there.

The first layer of a step works them out for all.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from vllm_lminf.kernels.base import DeviceBatch, Rotation
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotationTables, rotate


@dataclass
class InverseRotations:
    """Rotations that move pairs beyond the distance limit to it; the same for every layer.

    Attributes:
        query_cos, query_sin: float32 [num_tokens, rotary_dim / 2]: rotate a rotated query at
            position ``i >= limit`` back by ``i - limit``, that is to the angle of ``limit``.
            A nearer query, which has no pair beyond the limit, is left as it is.
        key_cos, key_sin: float32 [num_global, rotary_dim / 2]: rotate a rotated global key at ``j``
            back by ``j``, that is to the angle of 0. There are as many as lie behind the window of
            some query, which n_global may exceed by far.
        is_neox_style: how rotated pairs are laid out.
    """

    query_cos: torch.Tensor
    query_sin: torch.Tensor
    key_cos: torch.Tensor
    key_sin: torch.Tensor
    is_neox_style: bool

    def of_rows(self, start: int, end: int) -> "InverseRotations":
        """The same for the queries in rows [start, end)."""
        return replace(
            self, query_cos=self.query_cos[start:end], query_sin=self.query_sin[start:end]
        )

    def rotate_queries(self, query: torch.Tensor, rows: slice) -> torch.Tensor:
        """Queries [num_rows, num_heads, head_size] at the angle of the limit."""
        return rotate(query, self.query_cos[rows], self.query_sin[rows], self.is_neox_style)

    def rotate_keys(self, key: torch.Tensor) -> torch.Tensor:
        """The leading global keys [num_kv_heads, num_keys, head_size] at the angle of 0."""
        cos, sin = self.key_cos[: key.shape[1]], self.key_sin[: key.shape[1]]
        return rotate(key.transpose(0, 1), cos, sin, self.is_neox_style).transpose(0, 1)


def inverse_rotations(
    tables: RotationTables, is_neox_style: bool, positions: torch.Tensor, pattern: LambdaPattern
) -> InverseRotations:
    """The rotations for queries at ``positions`` (integers [num_tokens]) under this Λ."""
    query_cos, query_sin = tables((positions - pattern.distance_limit).clamp(min=0))
    last = int(positions.max()) if len(positions) else 0
    behind, _ = pattern.intervals(last)
    key_cos, key_sin = tables.leading(behind.stop)
    return InverseRotations(query_cos, -query_sin, key_cos, -key_sin, is_neox_style)


class HostBatch:
    """What `DeviceBatch` says, where Python can read it. To fetch it waits for the device.

    Attributes:
        query_start_loc: int32 [num_requests + 1], on the CPU.
        seq_lens: int32 [num_requests], on the CPU.
    """

    def __init__(self, batch: DeviceBatch) -> None:
        start, lens = batch.query_start_loc_cpu, batch.seq_lens_cpu
        self.query_start_loc = batch.query_start_loc.cpu() if start is None else start
        self.seq_lens = batch.seq_lens.cpu() if lens is None else lens
        self._device = batch.seq_lens.device
        self._inverse: dict[tuple[Rotation, LambdaPattern], InverseRotations] = {}

    @classmethod
    def of(cls, batch: DeviceBatch) -> "HostBatch":
        """The batch's one."""
        host: HostBatch | None = batch.shared.get("host")
        if host is None:
            host = batch.shared["host"] = cls(batch)
        return host

    @cached_property
    def positions(self) -> torch.Tensor:
        """Where the requests' rows stand; int64 [query_start_loc[-1]], on the batch's device."""
        query_lens = self.query_start_loc.diff()
        offset_in_request = torch.arange(int(self.query_start_loc[-1]))
        offset_in_request -= self.query_start_loc[:-1].repeat_interleave(query_lens)
        positions = (self.seq_lens - query_lens).repeat_interleave(query_lens) + offset_in_request
        return positions.to(self._device, torch.int64)

    def inverse_rotations(self, rotation: Rotation, pattern: LambdaPattern) -> InverseRotations:
        """The inverse rotations of the batch's queries under this Λ."""
        known = self._inverse.get((rotation, pattern))
        if known is None:
            known = self._inverse[rotation, pattern] = inverse_rotations(
                rotation.tables, rotation.is_neox_style, self.positions, pattern
            )
        return known
