"""Batches over a paged KV cache, and the attention they must get, by its literal definition.

Nothing here uses the package's own rotations or masks: a pair of dimensions is a complex number,
turning it is a product with a unit complex number, and a pair of tokens is an iteration of a loop.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch

from tests.kernels.layers import joint_cache, make_layer
from vllm_lminf.kernels import oracle
from vllm_lminf.kernels.base import DeviceBatch, Heads, Kernel, LayerConfig, PagedCache, ScoreRules
from vllm_lminf.kernels.cpu.kernel import CpuKernel
from vllm_lminf.kernels.host_batch import HostBatch, InverseRotations, inverse_rotations
from vllm_lminf.kernels.reference import ReferenceKernel
from vllm_lminf.kernels.triton.layer import TritonKernel
from vllm_lminf.pattern import LambdaPattern, cdiv
from vllm_lminf.rope import RotarySpec, RotationTables

TABLE_ERROR = (3 / math.sqrt(2) + 2 * math.sqrt(5)) * 2**-24
"""Bound on the distance between a unit vector of `RotationTables` and the true one.

A cosine or sine below 1 is rounded to float32 with an error up to 2**-25, so an entry (cos, sin)
is off by up to sqrt(2) * 2**-25, and three entries are joined. The two complex products that join
them, in float32, add up to sqrt(5) * 2**-24 each (Brent, Percival and Zimmermann, 2007).
"""

_FAR = 20_000  # The oracle materialises every key: longer sequences use the literal definition.
_UNSEEN = 1e4  # What the oracle holds where no query sees a key: it would show in any result.


def make_rotary(
    rotary_dim: int, is_neox_style: bool = True, magnitude: float = 1.0, theta: float = 1e4
) -> RotarySpec:
    inv_freq = theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    return RotarySpec(inv_freq, is_neox_style, magnitude)


def turn(x: torch.Tensor, positions: torch.Tensor, rotary: RotarySpec) -> torch.Tensor:
    """``x`` [tokens, heads, head_size], float64, as a model rotates it at ``positions``."""
    half = rotary.inv_freq.numel()
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    if rotary.is_neox_style:
        pairs = torch.complex(head[..., :half], head[..., half:])
    else:
        pairs = torch.complex(head[..., 0::2], head[..., 1::2])
    angles = positions.to(torch.float64)[:, None, None] * rotary.inv_freq
    pairs = pairs * torch.polar(torch.full_like(angles, rotary.magnitude), angles)
    if rotary.is_neox_style:
        head = torch.cat((pairs.real, pairs.imag), dim=-1)
    else:
        head = torch.view_as_real(pairs).flatten(-2)
    return torch.cat((head, rest), dim=-1)


def lambda_distance(pattern: LambdaPattern, i: int, j: int) -> int | None:
    """At which distance the query at ``i`` scores the key at ``j``; None if it doesn't see it."""
    if j > i or not (j < pattern.n_global or i - j < pattern.n_local):
        return None
    return min(i - j, pattern.distance_limit)


def literal_attention(
    query: torch.Tensor,
    query_positions: list[int],
    key: torch.Tensor,
    value: torch.Tensor,
    key_positions: list[int],
    distance_of: Callable[[int, int], int | None],
    *,
    scale: float,
    rotary: RotarySpec | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every visible pair scored at its distance, one after the other, in float64.

    Args:
        query: not rotated; [num_queries, num_heads, head_size].
        query_positions: where each query stands.
        key: not rotated; [num_keys, num_kv_heads, head_size].
        value: same shape.
        key_positions: where each key stands; positions that are left out are seen by no query.
        distance_of: as `lambda_distance` under some pattern.
        scale: factor on every score.
        rotary: RoPE, or None.
        alibi_slopes: ALiBi's slopes [num_heads], or None.
    """
    group = query.shape[1] // key.shape[1]
    query = query.to(torch.float64)
    key = key.to(torch.float64).repeat_interleave(group, dim=1)
    value = value.to(torch.float64).repeat_interleave(group, dim=1)
    output = torch.empty_like(query)
    for row, i in enumerate(query_positions):
        scores, seen = [], []
        for column, j in enumerate(key_positions):
            distance = distance_of(i, j)
            if distance is None:
                continue
            turned, still = query[row], key[column]
            if rotary is not None:
                turned = turn(turned[None], torch.tensor([distance]), rotary)[0]
                still = turn(still[None], torch.tensor([0]), rotary)[0]
            score = (turned * still).sum(dim=-1) * scale
            if alibi_slopes is not None:
                score = score - alibi_slopes * distance
            scores.append(score)
            seen.append(value[column])
        weights = torch.stack(scores).softmax(dim=0)
        output[row] = (weights[..., None] * torch.stack(seen)).sum(dim=0)
    return output


@dataclass(frozen=True)
class Case:
    """A batch to be drawn.

    Attributes:
        kind: a name for reports.
        requests: of each request, the tokens in the cache before and the tokens of this step.
        heads: query heads and key heads.
        head_size: dimensions of a head.
        block_size: tokens of a block.
        pattern: n_global, n_local and distance_limit.
        rotary_dim: leading dimensions that are rotated; 0 for a model without RoPE.
        is_neox_style: pairing of rotated dimensions.
        magnitude: YaRN's factor.
    """

    kind: str
    requests: tuple[tuple[int, int], ...]
    heads: tuple[int, int] = (6, 2)
    head_size: int = 64
    block_size: int = 16
    pattern: tuple[int, int, int] = (10, 48, 48)
    rotary_dim: int | None = None
    is_neox_style: bool = True
    magnitude: float = 1.0

    @property
    def id(self) -> str:
        requests = "+".join(f"{computed}:{new}" for computed, new in self.requests[:4])
        more = "..." if len(self.requests) > 4 else ""
        rotary = "" if self.rotary_dim is None else f"r{self.rotary_dim}"
        style = "neox" if self.is_neox_style else "gptj"
        pattern = "G{}-W{}-L{}".format(*self.pattern)
        return (
            f"{self.kind}[{requests}{more}]-h{self.heads[0]}/{self.heads[1]}-d{self.head_size}"
            f"{rotary}-{style}-B{self.block_size}-{pattern}"
        )


@dataclass
class _Stretch:
    """One request: its queries, and the keys that they see. Float64, not rotated."""

    query_positions: list[int]
    query: torch.Tensor
    key_positions: list[int]
    key: torch.Tensor
    value: torch.Tensor


@dataclass
class Batch:
    """A drawn batch. Queries and keys are float64, and not rotated until they are asked for."""

    pattern: LambdaPattern
    rotary: RotarySpec | None
    scale: float
    block_size: int
    num_blocks: int
    block_table: torch.Tensor
    stretches: list[_Stretch] = field(default_factory=list)

    @property
    def query_start_loc(self) -> list[int]:
        offsets = [0]
        for stretch in self.stretches:
            offsets.append(offsets[-1] + len(stretch.query_positions))
        return offsets

    @property
    def seq_lens(self) -> list[int]:
        return [stretch.query_positions[-1] + 1 for stretch in self.stretches]

    @property
    def positions(self) -> torch.Tensor:
        return torch.tensor([i for s in self.stretches for i in s.query_positions])

    def query(self, dtype: torch.dtype) -> torch.Tensor:
        """Rotated queries of the batch, as the kernel gets them."""
        rows = [self._turn(s.query, s.query_positions) for s in self.stretches]
        return torch.cat(rows).to(dtype)

    def kv_cache(self, dtype: torch.dtype) -> torch.Tensor:
        """The cache: NaN everywhere but in the slots of keys that a query of this batch sees."""
        num_kv_heads, head_size = self.stretches[0].key.shape[1:]
        shape = (self.num_blocks, num_kv_heads, self.block_size, 2 * head_size)
        cache = torch.full(shape, torch.nan, dtype=dtype)
        # Within a head's share of a block, all keys come before all values.
        halves = cache.view(self.num_blocks, num_kv_heads, 2, self.block_size, head_size)
        for row, stretch in enumerate(self.stretches):
            where = torch.tensor(stretch.key_positions)
            block = self.block_table[row, where // self.block_size].long()
            key = self._turn(stretch.key, stretch.key_positions)
            halves[block, :, 0, where % self.block_size] = key.to(dtype)
            halves[block, :, 1, where % self.block_size] = stretch.value.to(dtype)
        return cache

    def inverse_rotations(self) -> InverseRotations | None:
        """Far rotations from the package's tables."""
        if self.rotary is None:
            return None
        tables = RotationTables(self.rotary.inv_freq)
        return inverse_rotations(tables, self.rotary.is_neox_style, self.positions, self.pattern)

    def exact_inverse_rotations(self) -> InverseRotations | None:
        """Far rotations from cosines and sines in float64: what remains is the kernel's doing."""
        if self.rotary is None:
            return None
        back = (self.positions - self.pattern.distance_limit).clamp(min=0)
        query = back.to(torch.float64)[:, None] * self.rotary.inv_freq
        key = torch.arange(self.pattern.n_global, dtype=torch.float64)[:, None]
        key = key * self.rotary.inv_freq
        return InverseRotations(
            query.cos(), -query.sin(), key.cos(), -key.sin(), self.rotary.is_neox_style
        )

    def run_paged(self, dtype: torch.dtype, inverse: InverseRotations | None) -> torch.Tensor:
        """The kernel's output [num_tokens, num_heads, head_size]."""
        query = self.query(dtype)
        output = torch.full_like(query, torch.nan)
        self.attend(query, inverse, output)
        return output

    def attend(
        self, query: torch.Tensor, inverse: InverseRotations | None, output: torch.Tensor
    ) -> None:
        """Calls the kernel with rows of the caller's."""
        kernel = ReferenceKernel(self.layer(query.dtype))
        cache = joint_cache(self.kv_cache(query.dtype))
        kernel.attend(query, cache, self.device_batch(inverse=inverse), output)

    def layer(
        self,
        dtype: torch.dtype,
        rules: ScoreRules | None = None,
        device: torch.device | str = "cpu",
        **more: Any,
    ) -> LayerConfig:
        """A layer like this batch's."""
        num_kv_heads, head_size = self.stretches[0].key.shape[1:]
        heads = Heads(self.stretches[0].query.shape[1], num_kv_heads, head_size, dtype)
        rules = rules or ScoreRules(self.scale)
        more = {"block_size": self.block_size, **more}
        return make_layer(heads, self.pattern, rules, device, self.rotary, **more)

    def run_cpu(
        self, dtype: torch.dtype, inverse: InverseRotations | None, rules: ScoreRules
    ) -> torch.Tensor:
        """The compiled kernel's output, on a cache that it has written itself."""
        query = self.query(dtype)
        num_kv_heads, head_size = self.stretches[0].key.shape[1:]
        kernel = CpuKernel(self.layer(dtype, rules))
        cache = joint_cache(
            torch.full(
                (self.num_blocks, num_kv_heads, self.block_size, 2 * head_size),
                torch.nan,
                dtype=dtype,
            )
        )
        self.fill(kernel, cache, dtype)
        output = torch.full_like(query, torch.nan)
        kernel.attend(query, cache, self.device_batch(inverse=inverse), output)
        return output

    @property
    def slots(self) -> list[torch.Tensor]:
        """Of every request, the slots of the keys that its queries see."""
        slots = []
        for row, stretch in enumerate(self.stretches):
            where = torch.tensor(stretch.key_positions)
            block = self.block_table[row, where // self.block_size].long()
            slots.append(block * self.block_size + where % self.block_size)
        return slots

    def device_batch(
        self, device: torch.device | str = "cpu", inverse: InverseRotations | None = None
    ) -> DeviceBatch:
        """The batch's description as tensors on a device.

        Args:
            device: where.
            inverse: inverse rotations to take in place of those from the package's tables.
        """
        start = torch.tensor(self.query_start_loc, dtype=torch.int32)
        batch = DeviceBatch(
            start.to(device),
            torch.tensor(self.seq_lens, dtype=torch.int32, device=device),
            self.block_table.to(device),
            int(start.diff().max()),
        )
        if inverse is not None:
            batch.shared["host"] = _GivenRotations(batch, inverse)
        return batch

    def empty_cache(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", heads_first: bool = True
    ) -> PagedCache:
        """A cache that holds NaN everywhere.

        Args:
            dtype: of keys and values.
            device: where.
            heads_first: whether memory has a block's heads before its tokens, or after.
        """
        num_kv_heads, head_size = self.stretches[0].key.shape[1:]
        shape = (self.num_blocks, num_kv_heads, self.block_size, head_size)
        halves = []
        for _ in ("key", "value"):
            if heads_first:
                half = torch.full(shape, torch.nan).to(dtype)
            else:
                half = torch.full((shape[0], shape[2], shape[1], shape[3]), torch.nan).to(dtype)
                half = half.transpose(1, 2)
            halves.append(half.to(device))
        return PagedCache(*halves)

    def fill(self, kernel: Kernel, cache: PagedCache, dtype: torch.dtype) -> None:
        """Writes all keys that are seen into their slots, and nothing else."""
        for stretch, slots in zip(self.stretches, self.slots, strict=True):
            key = self._turn(stretch.key, stretch.key_positions).to(dtype)
            value, device = stretch.value.to(dtype), cache.key.device
            kernel.write_cache(key.to(device), value.to(device), cache, slots.to(device))

    def run_triton(
        self,
        dtype: torch.dtype,
        rules: ScoreRules | None = None,
        *,
        cache: PagedCache | None = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """The Triton kernels' output, on a cache that they have written themselves."""
        kernel = TritonKernel(self.layer(dtype, rules, device))
        cache = self.empty_cache(dtype, device) if cache is None else cache
        self.fill(kernel, cache, dtype)
        query = self.query(dtype).to(device)
        output = torch.full_like(query, torch.nan)
        kernel.attend(query, cache, self.device_batch(device), output)
        return output.cpu()

    def quantise(self, dtype: torch.dtype, key_scale: float, value_scale: float) -> None:
        """Rounds keys, as they lie in the cache, and values to multiples of what fp8 can hold."""
        for stretch in self.stretches:
            key = self._turn(stretch.key, stretch.key_positions)
            key = (key / key_scale).to(dtype).double() * key_scale
            stretch.key = self._turn(key, [-j for j in stretch.key_positions])
            stretch.value = (stretch.value / value_scale).to(dtype).double() * value_scale

    def run_oracle(
        self, dtype: torch.dtype = torch.float64, rules: ScoreRules | None = None
    ) -> torch.Tensor:
        """The oracle's output, every step of it in ``dtype``; by other rules than the batch's own
        scale where some are given."""
        rules = rules or ScoreRules(self.scale)
        return torch.cat([self._oracle(stretch, dtype, rules) for stretch in self.stretches])

    def run_literal(self) -> torch.Tensor:
        return torch.cat(
            [
                literal_attention(
                    s.query, s.query_positions, s.key, s.value, s.key_positions,
                    partial(lambda_distance, self.pattern), scale=self.scale, rotary=self.rotary,
                )
                for s in self.stretches
            ]
        )  # fmt: skip

    def table_error(self) -> float:
        """Bound on what the tables' rounding does to an output.

        Either vector of a clamped pair is off by TABLE_ERROR of its length, so a score is
        off by at most e = 2 * TABLE_ERROR * scale * |q| * |k|. Its weight in the softmax is then
        off by a factor within exp(+-2e), and an output by (exp(2e) - 1) of the largest value.
        """
        if self.rotary is None:
            return 0.0
        query = max(s.query.norm(dim=-1).max().item() for s in self.stretches)
        key = max(s.key.norm(dim=-1).max().item() for s in self.stretches)
        value = max(s.value.abs().max().item() for s in self.stretches)
        lengths = query * key * self.rotary.magnitude**2
        return math.expm1(4 * TABLE_ERROR * self.scale * lengths) * value

    def _turn(self, x: torch.Tensor, positions: list[int]) -> torch.Tensor:
        return x if self.rotary is None else turn(x, torch.tensor(positions), self.rotary)

    def _oracle(self, stretch: _Stretch, dtype: torch.dtype, rules: ScoreRules) -> torch.Tensor:
        seq_len = stretch.query_positions[-1] + 1
        if seq_len > _FAR:
            raise ValueError(f"{seq_len} tokens are too many to materialise: use run_literal")
        key = torch.full((seq_len, *stretch.key.shape[1:]), _UNSEEN, dtype=dtype)
        value = key.clone()
        key[stretch.key_positions] = stretch.key.to(dtype)
        value[stretch.key_positions] = stretch.value.to(dtype)
        return oracle.lambda_attention(
            stretch.query.to(dtype),
            key,
            value,
            self.pattern,
            rotary=self.rotary,
            query_start=stretch.query_positions[0],
            **vars(rules),
        )


class _GivenRotations(HostBatch):
    """A batch on the host with inverse rotations of the test's."""

    def __init__(self, batch: DeviceBatch, inverse: InverseRotations) -> None:
        super().__init__(batch)
        self.given = inverse

    def inverse_rotations(self, *_: object) -> InverseRotations:
        return self.given


def make_batch(case: Case, seed: int = 0) -> Batch:
    """Draws a batch. Blocks lie in random order, among blocks that belong to nobody; entries of
    freed blocks, and entries past a request's end, name block 0, which is poisoned too."""
    generator = torch.Generator().manual_seed(seed)
    pattern = LambdaPattern(*case.pattern)
    rotary = None
    if case.rotary_dim != 0:
        rotary = make_rotary(case.rotary_dim or case.head_size, case.is_neox_style, case.magnitude)
    num_heads, num_kv_heads = case.heads

    def draw(count: int, heads: int) -> torch.Tensor:
        shape = (count, heads, case.head_size)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    live, stretches = [], []
    for computed, new in case.requests:
        seq_len = computed + new
        queries = list(range(computed, seq_len))
        window = range(max(0, computed - pattern.n_local + 1), seq_len)
        seen = sorted({*range(min(pattern.n_global, seq_len)), *window})
        num_entries = cdiv(seq_len, case.block_size)
        live.append([*chain(*pattern.kept_blocks(computed, case.block_size, num_entries))])
        stretches.append(
            _Stretch(
                queries,
                draw(new, num_heads),
                seen,
                draw(len(seen), num_kv_heads),
                draw(len(seen), num_kv_heads),
            )
        )
    num_blocks = 1 + sum(map(len, live)) + 3
    unused = list(range(1, num_blocks))
    random.Random(seed).shuffle(unused)
    longest = max(cdiv(computed + new, case.block_size) for computed, new in case.requests)
    block_table = torch.zeros(len(case.requests), longest + 2, dtype=torch.int32)
    for row, blocks in enumerate(live):
        for block in blocks:
            block_table[row, block] = unused.pop()
    return Batch(
        pattern,
        rotary,
        case.head_size**-0.5,
        case.block_size,
        num_blocks,
        block_table,
        stretches,
    )
