"""What xformers is asked for a batch: which queries, over which keys, under which bias.

It is put together once a step and serves all layers. Needs xformers.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import torch
from torch.nn import functional
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias

from vllm_lminf.kernels.base import DeviceBatch, PagedCache, Rotation
from vllm_lminf.pattern import MAX_POSITION, LambdaPattern, cdiv

FEW_QUERIES = 8
"""Up to so many queries of a request are sequences of their own."""


@dataclass(frozen=True)
class Operators:
    """The operators of xformers that are asked for.

    Attributes:
        paged: the split-KV operator, for pages of a cache.
        packed: the operator for keys that were copied together; None for the best that xformers
            finds.
    """

    paged: Any
    packed: Any


def default_operators() -> Operators:
    """The split-KV operator, and whatever FlashAttention xformers finds.

    Raises:
        RuntimeError: it finds none.
    """
    if not (fmha.flash.FwOp.is_available() or fmha.flash3.FwOp.is_available()):
        raise RuntimeError(
            "kernel 'xformers': the installed xformers finds no FlashAttention, neither PyTorch's "
            "own nor flash-attn: see `python -m xformers.info`, or choose kernel triton"
        )
    return Operators(fmha.triton_splitk.FwOp, None)


class Source(Enum):
    """Where keys and values lie."""

    CACHE = auto()
    """In the cache: [1, tokens of all pages, heads, 1, head_size]."""
    WINDOW = auto()
    """Copied together: [1, tokens of all windows, heads, 1, head_size]."""
    PREFIX = auto()
    """Copied together: [1, requests * prefix page, heads, 1, head_size], keys at position 0."""


@dataclass(frozen=True)
class Part:
    """One call of an operator.

    Attributes:
        source: of the keys.
        bias: xformers' description of who sees whom.
        operator: None for the best that xformers finds.
        rows: int64 [num_rows]: of the query; None for all.
        num_rows: how many.
        num_padded: that, and rows without keys up to a power of two: the split-KV kernel is
            compiled for every number of sequences.
    """

    source: Source
    bias: attn_bias.AttentionBias
    operator: Any
    rows: torch.Tensor | None
    num_rows: int
    num_padded: int

    def rows_of(self, query: torch.Tensor) -> torch.Tensor:
        """Its queries [num_padded, num_heads, head_size]."""
        query = query if self.rows is None else query[self.rows]
        return functional.pad(query, (0, 0, 0, 0, 0, self.num_padded - self.num_rows))


@dataclass(frozen=True)
class Slots:
    """Places in a cache: block and offset of tokens, integers of one shape [...]."""

    block: torch.Tensor
    offset: torch.Tensor

    def copy_of(self, half: torch.Tensor) -> torch.Tensor:
        """What these places hold: [..., num_kv_heads, head_size].

        Args:
            half: keys or values of a cache [num_blocks, num_kv_heads, block_size, head_size].
        """
        return half.transpose(1, 2)[self.block, self.offset]


@dataclass(frozen=True)
class Pages:
    """A cache as xformers takes it: one row of evenly spaced tokens.

    A block is one page of several that the row has from one block to the next: what lies between
    (values between keys, other heads) is never part of a block table.

    Attributes:
        key, value: [1, num_pages * block_size, num_kv_heads, 1, head_size], views of the cache.
        pages_per_block: how many pages there are from one block to the next.
    """

    key: torch.Tensor
    value: torch.Tensor
    pages_per_block: int

    @classmethod
    def of(cls, cache: PagedCache) -> "Pages":
        """Views of a cache.

        Raises:
            ValueError: blocks aren't a whole number of pages apart, or there are too many.
        """
        block, _, token, _ = cache.key.stride()
        block_size = cache.key.shape[2]
        page = block_size * token
        if cache.value.stride()[::2] != (block, token) or block % page != 0:
            raise ValueError(
                f"a cache with strides {cache.key.stride()} for keys and {cache.value.stride()} "
                "for values: xformers takes one whose tokens are evenly spaced from block to block"
            )
        pages_per_block = max(1, block // page)
        num_pages = (cache.key.shape[0] - 1) * pages_per_block + 1
        if num_pages * block_size > MAX_POSITION:
            raise ValueError(
                f"a cache of {num_pages} pages of {block_size} tokens: xformers counts tokens in "
                "32 bits; choose a memory order in which a block's heads lie within a token"
            )
        return cls(_as_row(cache.key, num_pages), _as_row(cache.value, num_pages), pages_per_block)


def _as_row(half: torch.Tensor, num_pages: int) -> torch.Tensor:
    _, num_kv_heads, block_size, head_size = half.shape
    _, head, token, _ = half.stride()
    length = num_pages * block_size
    return half.as_strided(
        (1, length, num_kv_heads, 1, head_size), (length * token, token, head, head_size, 1)
    )


@dataclass(frozen=True)
class Plan:
    """All of a batch.

    Attributes:
        parts: calls whose results, merged, are the attention; those of the window come first and
            have every row once between them.
        window: places of the keys that are copied together, or None.
        prefix: places [num_requests, prefix page] of the global keys, or None.
        query_turn: cosines and sines [num_tokens, rotary_dim / 2] that turn queries to the limit,
            or None.
        key_turn: the same [prefix page, rotary_dim / 2] for global keys, back to position 0.
    """

    parts: tuple[Part, ...]
    window: Slots | None
    prefix: Slots | None
    query_turn: tuple[torch.Tensor, torch.Tensor] | None
    key_turn: tuple[torch.Tensor, torch.Tensor] | None


def make_plan(
    batch: DeviceBatch,
    num_tokens: int,
    pattern: LambdaPattern,
    rotation: Rotation | None,
    block_size: int,
    pages_per_block: int,
    operators: Operators,
) -> Plan:
    """Puts a plan together.

    Args:
        batch: the batch.
        num_tokens: rows of the query, padding included.
        pattern: the Λ.
        rotation: the model's RoPE, or None: then no pair is scored otherwise for being far.
        block_size: tokens of a block.
        pages_per_block: see `Pages`.
        operators: what to compute with.
    """
    return _Planner(
        batch, num_tokens, pattern, rotation, block_size, pages_per_block, operators
    ).plan()


class _Planner:
    """See `make_plan`."""

    def __init__(
        self,
        batch: DeviceBatch,
        num_tokens: int,
        pattern: LambdaPattern,
        rotation: Rotation | None,
        block_size: int,
        pages_per_block: int,
        operators: Operators,
    ) -> None:
        self.batch = batch
        self.num_tokens = num_tokens
        # No request has more tokens than its row of the block table has room for.
        longest = batch.block_table.shape[1] * block_size
        self.pattern = replace(pattern, n_global=min(pattern.n_global, longest))
        self.rotation = rotation
        self.block_size = block_size
        self.pages_per_block = pages_per_block
        self.operators = operators
        self.device = batch.block_table.device
        # What is further than this gets turned.
        self.limit = pattern.n_local if rotation is None else pattern.distance_limit
        n_global = self.pattern.n_global
        self.prefix_tile = 16 if n_global <= 16 else 32 if n_global <= 32 else 64
        self.prefix_page = self.prefix_tile * cdiv(n_global, self.prefix_tile)
        row = torch.arange(num_tokens, dtype=torch.int32, device=self.device)
        ends = batch.query_start_loc[1:]
        request = torch.searchsorted(ends, row, right=True, out_int32=True)
        self.is_padding = request == ends.shape[0]
        self.request = request.clamp(max=ends.shape[0] - 1)
        self.position = batch.seq_lens[self.request] - ends[self.request] + row
        self.few, self.long = self._requests()

    def _requests(self) -> tuple[list[int] | None, list["_LongRequest"]]:
        """Rows of requests with a few queries, or None for all rows; and the other requests."""
        if self.batch.max_query_len <= FEW_QUERIES:
            return None, []
        batch = self.batch
        starts_cpu, lens_cpu = batch.query_start_loc_cpu, batch.seq_lens_cpu
        starts = (batch.query_start_loc if starts_cpu is None else starts_cpu).tolist()
        seq_lens = (batch.seq_lens if lens_cpu is None else lens_cpu).tolist()
        few: list[int] = []
        long = []
        for request, seq_len in enumerate(seq_lens):
            start, end = starts[request : request + 2]
            if end - start > FEW_QUERIES:
                long.append(_LongRequest(request, start, end, seq_len - (end - start)))
            else:
                few.extend(range(start, end))
        return few, long

    def plan(self) -> Plan:
        G, W = self.pattern.n_global, self.pattern.n_local
        i = self.position
        parts: list[Part] = []
        window = None
        if self.few is None or self.few:
            parts.append(self._cache_part(self.few, (i - W + 1).clamp(min=0), i + 1, W))
        if self.long:
            part, window = self._packed_window()
            parts.append(part)
        if G == 0:
            return Plan(tuple(parts), window, None, None, None)
        if self.limit > W:
            rows = self._rows(W, self.limit + G - 1)
            if rows is None or rows:
                start = (i - self.limit + 1).clamp(min=0)
                end = (i - W + 1).clamp(max=G)
                parts.append(self._cache_part(rows, start, end, min(G, self.limit - W)))
        rows = self._rows(self.limit, self.limit + G - 1)
        if rows is None or rows:
            parts.append(self._prefix_part(rows, (i - self.limit + 1).clamp(max=G)))
        parts.extend(self._packed_prefix())
        query_turn = key_turn = None
        if self.rotation is not None:
            cos, sin = self.rotation.tables((i - self.limit).clamp(min=0))
            query_turn = cos, -sin
            cos, sin = self.rotation.tables.leading(self.prefix_page)
            key_turn = cos, -sin
        return Plan(tuple(parts), window, self._prefix_slots(), query_turn, key_turn)

    def _rows(self, first: int, end: int) -> list[int] | None:
        """Rows of requests with a few queries, and of the others those at [first, end)."""
        if self.few is None:
            return None
        return self.few + [row for request in self.long for row in request.rows(first, end)]

    def _cache_part(
        self, rows: list[int] | None, start: torch.Tensor, end: torch.Tensor, longest: int
    ) -> Part:
        """Queries that see the keys at [start, end), at most ``longest``, each; [num_tokens]."""
        index, request, start, end = self._select(rows, start, end)
        table = self.batch.block_table
        first = start // self.block_size
        columns = torch.arange(cdiv(longest - 1, self.block_size) + 1, device=self.device)
        blocks = first[:, None] + columns
        is_used = blocks * self.block_size < end[:, None]
        pages = table[request[:, None], blocks.clamp(max=table.shape[1] - 1)]
        pages = pages.masked_fill(~is_used, 0) * self.pages_per_block
        skipped = first * self.block_size
        tile = next(size for size in (64, 32, 16) if self.block_size % size == 0)
        return self._paged_part(
            Source.CACHE, index, start - skipped, end - skipped, pages, self.block_size, tile
        )

    def _prefix_part(self, rows: list[int] | None, end: torch.Tensor) -> Part:
        """Queries that see the first ``end`` global keys, turned; [num_tokens]."""
        index, request, start, end = self._select(rows, torch.zeros_like(end), end)
        return self._paged_part(
            Source.PREFIX, index, start, end, request[:, None], self.prefix_page, self.prefix_tile
        )

    def _select(
        self, rows: list[int] | None, start: torch.Tensor, end: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Index, requests and stretches of some rows. An empty stretch begins at 0: within a tile
        the kernel takes no other."""
        is_empty = (start >= end) | self.is_padding
        start, end = start.masked_fill(is_empty, 0), end.masked_fill(is_empty, 0)
        if rows is None:
            return None, self.request, start, end
        index = torch.tensor(rows, device="cpu").to(self.device, non_blocking=True)
        return index, self.request[index], start[index], end[index]

    def _paged_part(
        self,
        source: Source,
        rows: torch.Tensor | None,
        start: torch.Tensor,
        end: torch.Tensor,
        pages: torch.Tensor,
        page_size: int,
        tile: int,
    ) -> Part:
        num_rows = start.shape[0]
        num_padded = 1 << (num_rows - 1).bit_length()
        padding = num_padded - num_rows
        # The lists are for the host's use, which has none for these operators.
        queries = attn_bias._SeqLenInfo(
            torch.arange(num_padded + 1, dtype=torch.int32, device=self.device),
            max_seqlen=1,
            min_seqlen=1,
            seqstart_py=range(num_padded + 1),
        )
        keys = attn_bias._GappySeqInfo(
            functional.pad(start, (0, padding + 1)).int(),
            max_seqlen=pages.shape[1] * page_size,
            min_seqlen=0,
            seqstart_py=[],
            seqlen=functional.pad(end, (0, padding)).int(),
            seqlen_py=[],
        )
        bias = attn_bias.PagedBlockDiagonalGappyKeysMask(
            queries, keys, functional.pad(pages, (0, 0, 0, padding)).int(), page_size
        )
        operator = self.operators.paged.get_operator(None, block_n=tile)
        return Part(source, bias, operator, rows, num_rows, num_padded)

    def _packed_window(self) -> tuple[Part, Slots]:
        """The window of all requests with more than a few queries."""
        queries = [request.end - request.start for request in self.long]
        firsts = [self.pattern.window_start(request.computed) for request in self.long]
        ends = [request.computed + count for request, count in zip(self.long, queries, strict=True)]
        counts = [end - first for first, end in zip(firsts, ends, strict=True)]
        bias = attn_bias.BlockDiagonalMask.from_seqlens(queries, counts, device=self.device)
        bias = bias.make_local_attention_from_bottomright(self.pattern.n_local)
        owner = torch.tensor([request.index for request in self.long], device="cpu")
        owner = owner.repeat_interleave(torch.tensor(counts, device="cpu"))
        stretches = [torch.arange(*s, device="cpu") for s in zip(firsts, ends, strict=True)]
        owner = owner.to(self.device, non_blocking=True)
        position = torch.cat(stretches).to(self.device, non_blocking=True)
        block = self.batch.block_table[owner, position // self.block_size]
        slots = Slots(block.long(), position % self.block_size)
        rows = [row for request in self.long for row in range(request.start, request.end)]
        return self._packed_part(Source.WINDOW, rows, bias), slots

    def _packed_prefix(self) -> list[Part]:
        """Queries, of requests with more than a few, that are far from every global key, if any."""
        first = self.limit + self.pattern.n_global - 1
        seen = [(request, request.rows(first, MAX_POSITION + 1)) for request in self.long]
        seen = [(request, rows) for request, rows in seen if rows]
        if not seen:
            return []
        starts = [request.index * self.prefix_page for request, _ in seen]
        total = self.batch.seq_lens.shape[0] * self.prefix_page
        bias = attn_bias.BlockDiagonalGappyKeysMask.from_seqlens(
            [len(rows) for _, rows in seen],
            [*starts, total],
            [self.pattern.n_global] * len(seen),
            device=self.device,
        )
        return [self._packed_part(Source.PREFIX, [row for _, rows in seen for row in rows], bias)]

    def _packed_part(self, source: Source, rows: list[int], bias: attn_bias.AttentionBias) -> Part:
        index = None
        if len(rows) < self.num_tokens:
            index = torch.tensor(rows, device="cpu").to(self.device, non_blocking=True)
        return Part(source, bias, self.operators.packed, index, len(rows), len(rows))

    def _prefix_slots(self) -> Slots:
        """Places of the global keys. In place of a token that isn't there stands the first one: a
        kernel loads whole tiles, and what a weight of zero is multiplied with must be a number."""
        batch = self.batch
        token = torch.arange(self.prefix_page, device=self.device)
        has_rows = batch.query_start_loc.diff() > 0
        is_there = (token < self.pattern.n_global) & (token < batch.seq_lens[:, None])
        token = token.where(is_there & has_rows[:, None], 0)
        block = batch.block_table.gather(1, token // self.block_size)
        # Requests of padding have no blocks.
        return Slots(block.masked_fill(~has_rows[:, None], 0).long(), token % self.block_size)


@dataclass(frozen=True)
class _LongRequest:
    """A request with more than a few queries, in rows [start, end).

    Attributes:
        index: in the batch.
        computed: the position of its first query.
    """

    index: int
    start: int
    end: int
    computed: int

    def rows(self, first: int, end: int) -> range:
        """Rows of its queries at positions [first, end)."""
        shift = self.start - self.computed
        first, end = (min(max(i + shift, self.start), self.end) for i in (first, end))
        return range(first, end)
