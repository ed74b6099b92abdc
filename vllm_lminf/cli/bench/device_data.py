"""The requests of ``bench kernel --device cuda``, and what they must get by the oracle."""

from __future__ import annotations

import torch

from vllm_lminf.cli.bench.device_job import DeviceCase, DeviceJob
from vllm_lminf.kernels import oracle
from vllm_lminf.kernels.base import DeviceBatch, PagedCache
from vllm_lminf.pattern import LambdaPattern, cdiv
from vllm_lminf.rope import RotarySpec, RotationTables, rotate

ROPE_THETA = 10000.0
ORACLE_SAMPLES = 8
_DRAWN_TOKENS = 16384
"""Keys and values that are drawn; sequences that are longer have them again and again."""


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance from what is expected, in units of its norm; NaN and infinity are infinite."""
    output, expected = output.to("cpu", torch.float64), expected.to("cpu", torch.float64)
    error = float((output - expected).norm() / expected.norm())
    return error if output.isfinite().all() else float("inf")


class Layer:
    """What the batches of a job have in common."""

    def __init__(self, job: DeviceJob) -> None:
        self.heads, self.block_size = job.heads, job.block_size
        self.device = torch.device(job.device)
        self.dtype: torch.dtype = getattr(torch, job.dtype)
        size = job.heads.head_size
        inv_freq = ROPE_THETA ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        self.rotary = RotarySpec(inv_freq, is_neox_style=True)
        self.tables = RotationTables(inv_freq, self.device)
        self.scale = size**-0.5
        self.generator = torch.Generator(self.device).manual_seed(0)
        self._key = self.draw(_DRAWN_TOKENS, job.heads.num_kv_heads)
        self._value = self.draw(_DRAWN_TOKENS, job.heads.num_kv_heads)

    def draw(self, tokens: int, num_heads: int) -> torch.Tensor:
        """Random heads of so many tokens."""
        shape = (tokens, num_heads, self.heads.head_size)
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.to(self.dtype)

    def key_and_value(
        self, request: int, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys, and values, of a request at integer positions."""
        drawn = (positions + 101 * request) % _DRAWN_TOKENS
        return self._key[drawn], self._value[drawn]

    def raw(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotated heads [tokens, num_heads, head_size] turned back to position 0; float64."""
        angles = positions.to("cpu", torch.float64)[:, None] * self.rotary.inv_freq
        return rotate(x.to("cpu", torch.float64), angles.cos(), -angles.sin(), is_neox_style=True)


class Batch:
    """One step of some requests.

    A block that no window and no prefix needs isn't there, as in an engine that has freed it, and
    its entry of the block table names block 0, which holds NaN; unless full attention is to be
    compared, which needs all blocks.
    """

    def __init__(self, case: DeviceCase, layer: Layer, window: int, n_global: int) -> None:
        self.case, self.layer = case, layer
        self.is_complete = case.kind != "context"
        block_size, device = layer.block_size, layer.device
        num_blocks = cdiv(case.length, block_size)
        first = 0 if self.is_complete else (case.length - case.queries - window + 1) // block_size
        pinned = min(cdiv(n_global, block_size), first)
        kept = torch.cat((torch.arange(pinned), torch.arange(first, num_blocks))).to(device)
        total = 1 + case.requests * len(kept)
        order = 1 + torch.randperm(total - 1, generator=layer.generator, device=device)
        table = torch.zeros(case.requests, num_blocks, dtype=torch.int32, device=device)
        table[:, kept] = order.view(case.requests, -1).int()
        # Tokens before heads, as vLLM's caches for GPUs have them in memory.
        shape = (total, block_size, layer.heads.num_kv_heads, layer.heads.head_size)
        key, value = (torch.full(shape, torch.nan, dtype=layer.dtype, device=device) for _ in "kv")
        positions = (kept[:, None] * block_size + torch.arange(block_size, device=device)).flatten()
        positions = positions[positions < case.length]
        for request in range(case.requests):
            blocks = table[request, positions // block_size].long()
            offsets = positions % block_size
            key[blocks, offsets], value[blocks, offsets] = layer.key_and_value(request, positions)
        self.cache = PagedCache(key.transpose(1, 2), value.transpose(1, 2))
        num_tokens = case.requests * case.queries
        self.query = layer.draw(num_tokens, layer.heads.num_heads)
        starts = torch.arange(0, num_tokens + 1, case.queries, dtype=torch.int32)
        lens = torch.full((case.requests,), case.length, dtype=torch.int32)
        self.told = DeviceBatch(
            starts.to(device), lens.to(device), table, case.queries, starts, lens
        )

    def position(self, row: int) -> int:
        """Where a row's query stands."""
        return self.case.length - self.case.queries + row % self.case.queries

    def kv_bytes(self, pattern: LambdaPattern) -> int:
        """Bytes of the keys and values that some query of the batch sees."""
        start = pattern.window_start(self.position(0))
        tokens = self.case.length - start + min(pattern.n_global, start)
        heads = self.layer.heads
        a_token = 2 * heads.num_kv_heads * heads.head_size * self.layer.dtype.itemsize
        return self.case.requests * tokens * a_token

    def flops(self, pattern: LambdaPattern) -> int:
        """Operations on the visible pairs: two products, a multiplication and an addition each."""
        positions = torch.arange(self.position(0), self.case.length)
        in_window = (positions + 1).clamp(max=pattern.n_local)
        behind = (positions + 1 - in_window).clamp(max=pattern.n_global)
        heads = self.layer.heads
        pairs = self.case.requests * int((in_window + behind).sum())
        return 4 * pairs * heads.num_heads * heads.head_size

    def error(self, output: torch.Tensor, pattern: LambdaPattern) -> float:
        """How far an output [rows, num_heads, head_size] is from the oracle's, on queries and heads
        spread over both.

        What lies between a query's prefix and its window is left out for the oracle: the Λ is
        scored by distances, and none of those that count changes.
        """
        heads, layer = self.layer.heads, self.layer
        group, last = heads.num_heads // heads.num_kv_heads, len(self.query) - 1
        found, expected = [], []
        for sample in range(ORACLE_SAMPLES):
            row = round(sample * last / (ORACLE_SAMPLES - 1))
            kv_head = sample % heads.num_kv_heads
            of_group = slice(kv_head * group, (kv_head + 1) * group)
            position = self.position(row)
            start = pattern.window_start(position)
            seen = torch.cat(
                (torch.arange(min(pattern.n_global, start)), torch.arange(start, position + 1))
            )
            key, value = layer.key_and_value(row // self.case.queries, seen.to(layer.device))
            query = self.query[row : row + 1, of_group]
            expected.append(
                oracle.lambda_attention(
                    layer.raw(query, torch.tensor([position])),
                    layer.raw(key[:, kv_head : kv_head + 1], seen),
                    value[:, kv_head : kv_head + 1].to("cpu", torch.float64),
                    pattern,
                    scale=layer.scale,
                    rotary=layer.rotary,
                    query_start=len(seen) - 1,
                )
            )
            found.append(output[row : row + 1, of_group].cpu())
        return relative_error(torch.cat(found), torch.cat(expected))
