"""The data that contenders share: requests in a paged cache, a batch of them, what the oracle says.

Keys and queries are drawn as rotated ones; for the oracle, which rotates, they are rotated back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_lminf.kernels import oracle
from vllm_lminf.pattern import LambdaPattern, cdiv
from vllm_lminf.rope import RotarySpec, RotationTables, rotate

ROPE_THETA = 10000.0
ORACLE_SAMPLES = 8
_DRAWN_TOKENS = 16384
"""Keys and values that are drawn; longer sequences repeat them."""

TOLERANCES = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""How far an output may be from the oracle's, relative and in norm: about three times what rounding
makes of it. One of 2048 keys that is left out moves the output by 0.02."""

N_GLOBALS = (0, 10, 100)
"""Numbers of global tokens that LMINF is timed with."""
SHOWN_N_GLOBAL = 10
"""The one that is shown where there is room for one."""

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Stores keys and values, each [tokens, num_kv_heads, head_size], in slots, int64 [tokens]."""


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance from what is expected, in units of its norm; NaN and infinity are infinite."""
    output, expected = (x.to("cpu", torch.float64) for x in (output, expected))
    error = float((output - expected).norm() / expected.norm())
    return error if output.isfinite().all() else float("inf")


@dataclass(frozen=True)
class Shape:
    """A layer: query heads, key heads, dimensions of a head."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}/{self.head_size}"


@dataclass(frozen=True)
class Setting:
    """What all cases of a run have in common.

    Attributes:
        device: where they run.
        dtype: of queries, cache and output.
        window: tokens that a query sees, its own included.
        block_size: tokens of a block of the cache.
    """

    device: torch.device
    dtype: torch.dtype
    window: int
    block_size: int

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]


class Sequences:
    """Requests of one length under one block table.

    Args:
        setting: the run's.
        shape: of the layer.
        count: how many requests.
        length: tokens of each.
        is_complete: whether all blocks are there, as full attention needs them. If not, those that
            neither the prefix nor the last query's window needs are freed, as an engine would have
            done: their entries name block 0, in which nothing is ever written.
    """

    def __init__(
        self, setting: Setting, shape: Shape, count: int, length: int, is_complete: bool = True
    ) -> None:
        self.setting, self.shape, self.count, self.length = setting, shape, count, length
        self.is_complete = is_complete
        device, block_size = setting.device, setting.block_size
        inv_freq = ROPE_THETA ** -(
            torch.arange(0, shape.head_size, 2, dtype=torch.float64) / shape.head_size
        )
        self.rotary = RotarySpec(inv_freq, is_neox_style=True)
        self.tables = RotationTables(inv_freq, device)
        self.scale = shape.head_size**-0.5
        self.generator = torch.Generator(device).manual_seed(0)
        self._key, self._value = (self.draw(_DRAWN_TOKENS, shape.num_kv_heads) for _ in "kv")

        num_blocks = cdiv(length, block_size)
        first = 0 if is_complete else max(0, length - setting.window) // block_size
        pinned = min(cdiv(max(N_GLOBALS), block_size), first)
        kept = torch.cat((torch.arange(pinned), torch.arange(first, num_blocks))).to(device)
        self.num_blocks = 1 + count * len(kept)
        order = 1 + torch.randperm(self.num_blocks - 1, generator=self.generator, device=device)
        self.block_table = torch.zeros(count, num_blocks, dtype=torch.int32, device=device)
        self.block_table[:, kept] = order.view(count, -1).int()
        offsets = torch.arange(block_size, device=device)
        positions = (kept[:, None] * block_size + offsets).flatten()
        self.live_positions = positions[positions < length]

    def draw(self, tokens: int, num_heads: int) -> torch.Tensor:
        """Random heads of so many tokens."""
        size = (tokens, num_heads, self.shape.head_size)
        drawn = torch.randn(size, generator=self.generator, device=self.setting.device)
        return drawn.to(self.setting.dtype)

    def key_and_value(
        self, request: int, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys, and values, of a request at integer positions."""
        drawn = (positions + 101 * request) % _DRAWN_TOKENS
        return self._key[drawn], self._value[drawn]

    def fill(self, write: Write) -> None:
        """Has a contender store every key and value whose block is there."""
        positions, block_size = self.live_positions, self.setting.block_size
        for request in range(self.count):
            blocks = self.block_table[request, positions // block_size].long()
            key, value = self.key_and_value(request, positions)
            write(key, value, blocks * block_size + positions % block_size)

    def raw(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotated heads [tokens, num_heads, head_size] rotated back to position 0; float64."""
        angles = positions.to("cpu", torch.float64)[:, None] * self.rotary.inv_freq
        return rotate(x.to("cpu", torch.float64), angles.cos(), -angles.sin(), is_neox_style=True)


class Batch:
    """One step: the last queries of some of the requests.

    Args:
        sequences: the requests.
        query_lens: queries of every request that takes part, by its number.
    """

    def __init__(self, sequences: Sequences, query_lens: dict[int, int]) -> None:
        self.sequences, self.requests = sequences, list(query_lens)
        device, length = sequences.setting.device, sequences.length
        lens = torch.tensor(list(query_lens.values()))
        starts = torch.zeros(len(lens) + 1, dtype=torch.int32)
        starts[1:] = lens.cumsum(0)
        self.query_start_loc_cpu = starts
        self.seq_lens_cpu = torch.full((len(lens),), length, dtype=torch.int32)
        self.query_start_loc, self.seq_lens = starts.to(device), self.seq_lens_cpu.to(device)
        self.max_query_len = int(lens.max())
        self.block_table = sequences.block_table[self.requests].contiguous()
        self.positions = torch.cat([torch.arange(length - n, length) for n in lens.tolist()])
        self.request_of_row = torch.tensor(self.requests).repeat_interleave(lens).tolist()
        self.query = sequences.draw(len(self.positions), sequences.shape.num_heads)

    def kv_bytes(self, pattern: LambdaPattern) -> int:
        """Bytes of the keys and values that some query of the batch sees."""
        shape, tokens = self.sequences.shape, 0
        for first in self.positions[self.query_start_loc_cpu[:-1].long()].tolist():
            start = pattern.window_start(first)
            tokens += self.sequences.length - start + min(pattern.n_global, start)
        return 2 * tokens * shape.num_kv_heads * shape.head_size * self.query.element_size()

    def flops(self, pattern: LambdaPattern) -> int:
        """Operations on the visible pairs: two products, a multiplication and an addition each."""
        shape = self.sequences.shape
        in_window = (self.positions + 1).clamp(max=pattern.n_local)
        behind = (self.positions + 1 - in_window).clamp(max=pattern.n_global)
        return 4 * int((in_window + behind).sum()) * shape.num_heads * shape.head_size

    def error(self, output: torch.Tensor, pattern: LambdaPattern) -> float:
        """How far an output [rows, num_heads, head_size] is from the oracle's, relative and in
        norm, on queries and heads spread over both.

        The oracle is given a query's prefix and its window, one right behind the other: the prefix
        stays out of the window's reach, at the distance limit, so no score changes.
        """
        sequences, shape = self.sequences, self.sequences.shape
        group, last = shape.num_heads // shape.num_kv_heads, len(self.query) - 1
        found, expected = [], []
        for sample in range(ORACLE_SAMPLES):
            row = round(sample * last / (ORACLE_SAMPLES - 1))
            kv_head = sample % shape.num_kv_heads
            of_group = slice(kv_head * group, (kv_head + 1) * group)
            position = int(self.positions[row])
            start = pattern.window_start(position)
            prefix = torch.arange(min(pattern.n_global, start))
            seen = torch.cat((prefix, torch.arange(start, position + 1)))
            key, value = sequences.key_and_value(
                self.request_of_row[row], seen.to(sequences.setting.device)
            )
            query = self.query[row : row + 1, of_group]
            expected.append(
                oracle.lambda_attention(
                    sequences.raw(query, torch.tensor([position])),
                    sequences.raw(key[:, kv_head : kv_head + 1], seen),
                    value[:, kv_head : kv_head + 1].to("cpu", torch.float64),
                    pattern,
                    scale=sequences.scale,
                    rotary=sequences.rotary,
                    query_start=len(seen) - 1,
                )
            )
            found.append(output[row : row + 1, of_group])
        return relative_error(torch.cat(found), torch.cat(expected))
