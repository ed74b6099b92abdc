"""Requests that recall from the middle, step by step as an engine runs them: for every kernel."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from tests.kernels.batches import make_rotary, turn
from tests.kernels.layers import int32_batch, make_layer
from vllm_lminf.kernels import oracle
from vllm_lminf.kernels.archive import RecallBatch
from vllm_lminf.kernels.base import Heads, Kernel, LayerConfig, PagedCache, Rotation, ScoreRules
from vllm_lminf.middle import ALL_ROWS, Middle
from vllm_lminf.pattern import LambdaPattern, cdiv
from vllm_lminf.rope import RotarySpec, RotationTables

Steps = list[list[tuple[int, int]]]
"""Of each step the requests and how many tokens of each are computed."""


class ExactTables(RotationTables):
    """Cosines and sines in float64, so that what remains is a kernel's doing."""

    def __init__(self, inv_freq: torch.Tensor) -> None:
        super().__init__(inv_freq)
        self.inv_freq = inv_freq.double()

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.double()[:, None] * self.inv_freq
        return angles.cos(), angles.sin()


@dataclass(frozen=True)
class RecallCase:
    """Requests to be drawn.

    Attributes:
        requests: of each request, the tokens of its prompt, and all of its tokens.
        middle: what is recalled.
        heads: query heads and key heads.
        head_size: dimensions of a head.
        block_size: tokens of a block, and of a page.
        pattern: n_global, n_local and distance_limit.
        rotary_dim: leading dimensions that are rotated; 0 for a model without RoPE, None for all.
        is_neox_style: pairing of rotated dimensions.
        magnitude: YaRN's factor.
        softcap: see `ScoreRules`.
    """

    requests: tuple[tuple[int, int], ...]
    middle: Middle
    heads: tuple[int, int] = (6, 2)
    head_size: int = 16
    block_size: int = 16
    pattern: tuple[int, int, int] = (5, 20, 20)
    rotary_dim: int | None = None
    is_neox_style: bool = True
    magnitude: float = 1.0
    softcap: float | None = None

    @property
    def rotary(self) -> RotarySpec | None:
        if self.rotary_dim == 0:
            return None
        return make_rotary(self.rotary_dim or self.head_size, self.is_neox_style, self.magnitude)

    def layer(
        self, dtype: torch.dtype, exact: bool, device: torch.device | str = "cpu"
    ) -> LayerConfig:
        """A layer that computes this.

        Args:
            dtype: of queries, and of what is stored.
            exact: whether rotations are turned in float64, or by the package's tables.
            device: where.
        """
        rotary, rotation = self.rotary, None
        if rotary is not None:
            tables = (ExactTables if exact else RotationTables)(rotary.inv_freq).to(device)
            rotation = Rotation(tables, rotary.is_neox_style)
        return make_layer(
            Heads(*self.heads, self.head_size, dtype),
            LambdaPattern(*self.pattern),
            ScoreRules(self.head_size**-0.5, self.softcap),
            device,
            rotation=rotation,
            middle=self.middle,
            block_size=self.block_size,
        )

    def steps(self, chunk: int, together: bool) -> Steps:
        """Every request from its first token to its last: its prompt in chunks of so many tokens,
        then one token a step.

        Args:
            chunk: tokens of a chunk.
            together: whether all requests go in one batch, or one after the other.
        """

        def pieces(prompt_len: int, seq_len: int) -> Iterator[int]:
            for start in range(0, prompt_len, chunk):
                yield min(chunk, prompt_len - start)
            yield from [1] * (seq_len - prompt_len)

        each = [[*pieces(*lens)] for lens in self.requests]
        if not together:
            return [[(request, size)] for request, sizes in enumerate(each) for size in sizes]
        return [
            [(request, sizes[n]) for request, sizes in enumerate(each) if n < len(sizes)]
            for n in range(max(map(len, each)))
        ]


@dataclass
class Requests:
    """Drawn requests; of each the queries, keys and values of all its tokens, float64, not rotated:
    [seq_len, heads, head_size]."""

    case: RecallCase
    seed: int = 0
    drawn: list[list[torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        num_heads, num_kv_heads = self.case.heads
        for _, seq_len in self.case.requests:
            self.drawn.append(
                [
                    torch.randn(seq_len, heads, self.case.head_size, generator=generator).double()
                    for heads in (num_heads, num_kv_heads, num_kv_heads)
                ]
            )

    def expected(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        """The oracle's outputs, request by request, every step of it in ``dtype``."""
        case = self.case
        return [
            oracle.lambda_attention(
                *(x.to(dtype) for x in drawn),
                LambdaPattern(*case.pattern),
                scale=case.head_size**-0.5,
                rotary=case.rotary,
                softcap=case.softcap,
                middle=case.middle,
                prompt_len=prompt_len,
            )
            for drawn, (prompt_len, _) in zip(self.drawn, case.requests, strict=True)
        ]

    def run(
        self,
        kernel_class: type[Kernel],
        steps: Steps,
        dtype: torch.dtype = torch.float64,
        exact: bool = True,
        device: torch.device | str = "cpu",
    ) -> list[torch.Tensor]:
        """What a kernel computes, request by request. It writes cache and archive itself; what it
        hasn't written is NaN, and so are blocks of the cache once they are freed.

        Args:
            kernel_class: the kernel.
            steps: how the requests are cut and batched.
            dtype: of queries, and of what is stored.
            exact: as in `RecallCase.layer`.
            device: where the kernel runs, and all that it reads is.
        """
        case, pattern = self.case, LambdaPattern(*self.case.pattern)
        layer = case.layer(dtype, exact, device)
        assert kernel_class.unsupported_reasons(layer) == []
        kernel, size = kernel_class(layer), case.block_size
        lens = [seq_len for _, seq_len in case.requests]
        tables, num_blocks = draw_tables([cdiv(n, size) for n in lens], self.seed)
        pages, num_pages = draw_tables([cdiv(n, size) for n in lens], self.seed + 1)
        shape = (num_blocks, case.heads[1], size, case.head_size)
        nan = torch.full(shape, torch.nan, dtype=dtype, device=device)
        cache = PagedCache(nan, nan.clone())
        # Bytes of ones are NaN in every dtype.
        page = layer.archive_format.page_bytes
        archive = torch.full((num_pages, page), 255, dtype=torch.uint8, device=device)
        rotated = [self._rotated(drawn) for drawn in self.drawn]
        outputs = [torch.full_like(q, torch.nan, dtype=dtype) for q, _, _ in self.drawn]
        done = [0] * len(lens)
        for step in steps:
            for request, _ in step:
                for gap in pattern.freed_blocks(done[request], size):
                    for x in (cache.key, cache.value):
                        x[tables[request, list(gap)].long().to(device)] = torch.nan
                    tables[request, list(gap)] = 0
            rows = [slice(done[r], done[r] + n) for r, n in step]
            members = [r for r, _ in step]
            starts = [0]
            for _, count in step:
                starts.append(starts[-1] + count)
            batch = int32_batch(
                starts, [each.stop for each in rows], tables[members].tolist(), device
            )
            recall = RecallBatch(
                pages[members].to(device),
                self._slots(pages, members, rows).to(device),
                torch.tensor(
                    [case.middle.first_row(case.requests[r][0]) for r in members],
                    dtype=torch.int32,
                    device=device,
                ),
            )
            query, key, value = (
                torch.cat([rotated[r][x][each] for r, each in zip(members, rows, strict=True)]).to(
                    device, dtype
                )
                for x in range(3)
            )
            output = torch.full_like(query, torch.nan)
            slots = self._slots(tables, members, rows).to(device)
            kernel.write_cache(key, value, cache, slots)
            kernel.write_archive(key, value, archive, batch, recall)
            kernel.attend_and_recall(query, cache, batch, archive, recall, output)
            for n, (r, each) in enumerate(zip(members, rows, strict=True)):
                outputs[r][each] = output[starts[n] : starts[n + 1]].cpu()
                done[r] = each.stop
        return outputs

    def _rotated(self, drawn: list[torch.Tensor]) -> list[torch.Tensor]:
        rotary = self.case.rotary
        if rotary is None:
            return drawn
        query, key, value = drawn
        positions = torch.arange(len(query))
        return [turn(query, positions, rotary), turn(key, positions, rotary), value]

    def _slots(self, tables: torch.Tensor, members: list[int], rows: list[slice]) -> torch.Tensor:
        size, slots = self.case.block_size, []
        for request, each in zip(members, rows, strict=True):
            where = torch.arange(each.start, each.stop)
            slots.append(tables[request, where // size].long() * size + where % size)
        return torch.cat(slots)


def draw_tables(counts: list[int], seed: int) -> tuple[torch.Tensor, int]:
    """Block tables over blocks in random order, int32 [num_requests, most], and how many blocks
    there are. Block 0 belongs to nobody; entries past a request's end name it."""
    blocks = list(range(1, 1 + sum(counts)))
    random.Random(seed).shuffle(blocks)
    table = torch.zeros(len(counts), max(counts) + 2, dtype=torch.int32)
    for row, count in enumerate(counts):
        for b in range(count):
            table[row, b] = blocks.pop()
    return table, 1 + sum(counts)


def middle(top_k: int = 3, distance: int = 11, rows: int = ALL_ROWS, block_size: int = 1) -> Middle:
    """What tests recall."""
    return Middle(top_k, distance, rows, block_size=block_size)


RECALL_CASES = [
    # Units, and how many.
    RecallCase(((100, 106),), middle()),
    RecallCase(((100, 106),), middle(top_k=1)),
    RecallCase(((100, 106),), middle(top_k=500)),
    RecallCase(((100, 106),), middle(top_k=2, block_size=16)),
    RecallCase(((200, 203),), middle(top_k=1, block_size=64)),
    RecallCase(((100, 106),), middle(top_k=2, block_size=16), heads=(4, 4)),
    # Pages, from one that is shorter than the window to one that is longer than the middle.
    RecallCase(((150, 153),), middle(), block_size=32),
    RecallCase(((300, 303),), middle(), block_size=128),
    RecallCase(((150, 153),), middle(top_k=2, block_size=32), pattern=(33, 7, 9), block_size=32),
    # Heads.
    RecallCase(((90, 93),), middle(), heads=(1, 1)),
    RecallCase(((90, 93),), middle(), heads=(9, 3), head_size=64),
    RecallCase(((90, 93),), middle(top_k=1, block_size=16), heads=(8, 1), head_size=32),
    # Patterns: no prefix, a window of one token, a limit beyond it, no middle at all.
    RecallCase(((90, 93),), middle(), pattern=(0, 20, 20)),
    RecallCase(((90, 93),), middle(), pattern=(0, 1, 1)),
    RecallCase(((90, 93),), middle(top_k=2, block_size=16), pattern=(16, 16, 40)),
    RecallCase(((90, 93),), middle(), pattern=(40, 60, 60)),
    # Rotations, and distances that are nearer and farther than where the queries stand.
    RecallCase(((90, 93),), middle(distance=0)),
    RecallCase(((90, 93),), middle(distance=3000)),
    RecallCase(((90, 93),), middle(), rotary_dim=8, magnitude=1.3),
    RecallCase(((90, 93),), middle(), rotary_dim=8, is_neox_style=False),
    RecallCase(((90, 93),), middle(), rotary_dim=0),
    RecallCase(((90, 93),), middle(), softcap=2.0),
    RecallCase(((90, 93),), middle(top_k=2, block_size=16), softcap=2.0, rotary_dim=0),
    # Who looks.
    RecallCase(((90, 95),), middle(rows=1)),
    RecallCase(((90, 95),), middle(rows=3)),
    RecallCase(((10, 60),), middle(rows=3)),
    # Several requests, some too short to have a middle.
    RecallCase(((1, 2), (60, 64), (130, 131), (25, 30), (17, 80)), middle(rows=40)),
    RecallCase(((1, 9), (60, 64), (130, 131)), middle(top_k=2, rows=40, block_size=32)),
]
