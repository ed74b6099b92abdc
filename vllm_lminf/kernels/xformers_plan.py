"""Which partial attentions xformers computes for a batch, and their merge. Imports xformers.

All that is used of xformers is public in 0.0.35, but for what `_paged_bias` relies on.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias

from vllm_lminf.kernels.base import DeviceBatch, PagedCache, Rotation
from vllm_lminf.pattern import MAX_POSITION, LambdaPattern, cdiv
from vllm_lminf.rope import rotate

TensorPair = tuple[torch.Tensor, torch.Tensor]

Partial = tuple[torch.Tensor, torch.Tensor]
"""Attention over some of the keys [1, num_rows, num_kv_heads, group, head_size], and its
log-sum-exp, float32 [1, num_kv_heads, group, num_rows]."""

FEW_QUERIES = 8
"""Requests with more queries are attended by FlashAttention."""


class Operators(NamedTuple):
    """The split-KV operator, for pages of a cache, and the one for gathered keys: None for the best
    that xformers finds."""

    paged: Any = fmha.triton_splitk.FwOp
    packed: Any = None


def default_operators() -> Operators:
    """What xformers itself has.

    Raises:
        RuntimeError: it finds no FlashAttention.
    """
    if not (fmha.flash.FwOp.is_available() or fmha.flash3.FwOp.is_available()):
        raise RuntimeError(
            "kernel 'xformers': the installed xformers finds no FlashAttention, neither PyTorch's "
            "own nor flash-attn: see `python -m xformers.info`, or choose kernel triton"
        )
    return Operators()


@dataclass(frozen=True)
class Part:
    """One call of an operator.

    Attributes:
        bias: xformers' description of who sees whom.
        operator: None for the best that xformers finds.
        rows: int64 [num_rows] of the query; None for all.
        padding: rows without keys that follow, up to a power of two: the split-KV kernel is
            compiled for every number of sequences.
        slots: block and offset of the tokens whose keys are gathered; None for the cache's `Pages`.
        query_angles, key_angles: cosines and sines [num_rows or keys of a request, rotary_dim / 2]
            of the inverse rotations that leave queries at the distance limit and keys at position
            0; None for the vectors as they are.
    """

    bias: attn_bias.AttentionBias
    operator: Any
    rows: torch.Tensor | None
    padding: int = 0
    slots: TensorPair | None = None
    query_angles: TensorPair | None = None
    key_angles: TensorPair | None = None


@dataclass(frozen=True)
class Pages:
    """A cache as xformers takes it: one row of evenly spaced tokens. A block is one page; what lies
    between (values between keys, other heads) are pages that no block table names.

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
        num_blocks, heads, block_size, head_size = cache.key.shape
        block, _, token, _ = cache.key.stride()
        pages_per_block, rest = divmod(block, block_size * token)
        if cache.value.stride()[::2] != (block, token) or rest != 0:
            raise ValueError(
                f"a cache with strides {cache.key.stride()} for keys and {cache.value.stride()} "
                "for values: xformers takes one whose tokens are evenly spaced from block to block"
            )
        length = ((num_blocks - 1) * max(1, pages_per_block) + 1) * block_size
        if length > MAX_POSITION:
            raise ValueError(
                f"a cache of {length} tokens, gaps between blocks included: xformers counts tokens "
                "in 32 bits; choose a memory order in which a block's heads lie within a token"
            )
        shape = (1, length, heads, 1, head_size)
        key, value = (
            half.as_strided(shape, (length * token, token, half.stride(1), head_size, 1))
            for half in (cache.key, cache.value)
        )
        return cls(key, value, max(1, pages_per_block))


def make_plan(
    batch: DeviceBatch,
    num_tokens: int,
    pattern: LambdaPattern,
    rotation: Rotation | None,
    num_kv_heads: int,
    block_size: int,
    pages_per_block: int,
    operators: Operators,
) -> list[Part]:
    """The parts whose results, merged, are a batch's attention. Those of the window come first, and
    have every row once between them; padding may be in none.

    Args:
        batch: the batch.
        num_tokens: rows of the query, padding included.
        pattern: the Λ.
        rotation: the model's RoPE, or None: then no pair is scored otherwise for being far.
        num_kv_heads: of the layer.
        block_size: tokens of a block.
        pages_per_block: see `Pages`.
        operators: what to compute with.
    """
    W = pattern.n_local
    limit = W if rotation is None else pattern.distance_limit
    # No request has more tokens than its row of the block table has room for.
    G = min(pattern.n_global, batch.block_table.shape[1] * block_size)
    paged = _PagedParts(batch, num_tokens, num_kv_heads, operators)
    i = paged.position
    long = None
    if batch.max_query_len > FEW_QUERIES:
        long = _LongRequests(batch, num_tokens, i.device, operators)

    def rows(first: int = 0, end: int = 0) -> torch.Tensor | None:
        return None if long is None else long.others(first, end)

    in_cache = (block_size, pages_per_block)
    parts = paged.of(rows(), i - W + 1, i + 1, *in_cache, W)
    if long is not None:
        parts += long.window(pattern, block_size)
    if G == 0:
        return parts
    # From position `far` on, a query sees all global keys at the limit. A row before that sees some
    # of them, and is a sequence of its own, as the rows of requests with a few queries are.
    far = limit + G - 1
    if limit > W:
        end = (i - W + 1).clamp(max=G)
        parts += paged.of(rows(W, far), i - limit + 1, end, *in_cache, min(G, limit - W))
    page = 16 * cdiv(G, 16)
    prefix = paged.of(rows(limit, far), torch.zeros_like(i), (i - limit + 1).clamp(max=G), page)
    if long is not None:
        prefix += long.prefix(far, G, page)
    slots = _prefix_slots(batch, G, page, block_size)
    if rotation is None:
        return parts + [replace(part, slots=slots) for part in prefix]
    cos, sin = rotation.tables.leading(page)
    for part in prefix:
        at = i if part.rows is None else i[part.rows]
        query_cos, query_sin = rotation.tables((at - limit).clamp(min=0))
        parts.append(
            replace(part, slots=slots, query_angles=(query_cos, -query_sin), key_angles=(cos, -sin))
        )
    return parts


def attend(
    plan: list[Part],
    query: torch.Tensor,
    cache: PagedCache,
    pages: Pages,
    scale: float,
    rotation: Rotation | None,
) -> Partial:
    """The plan's parts, merged to one softmax, for all rows of the query."""
    result = lse = None
    for part in plan:
        partial = _attend_part(part, query, cache, pages, scale, rotation)
        if result is None or lse is None:
            if part.rows is None:
                result, lse = partial
                continue
            shape = 1, query.shape[0], *partial[0].shape[2:]
            result = partial[0].new_zeros(shape, dtype=torch.float32)
            lse = partial[1].new_full((*partial[1].shape[:3], query.shape[0]), -torch.inf)
        rows = slice(None) if part.rows is None else part.rows
        both = zip((result[:, rows], lse[..., rows]), partial, strict=True)
        merged = fmha.merge_attentions(*both, output_dtype=torch.float32)
        if part.rows is None:
            result, lse = merged
        else:
            result = result.float()
            result[:, rows], lse[..., rows] = merged
    assert result is not None
    assert lse is not None  # a batch has rows
    return result, lse


def _attend_part(
    part: Part,
    query: torch.Tensor,
    cache: PagedCache,
    pages: Pages,
    scale: float,
    rotation: Rotation | None,
) -> Partial:
    key, value = pages.key, pages.value
    if part.slots is not None:
        key, value = (half.transpose(1, 2)[part.slots] for half in (cache.key, cache.value))
    if part.rows is not None:
        query = query[part.rows]
    if rotation is not None and part.query_angles and part.key_angles:
        query = rotate(query, *part.query_angles, rotation.is_neox_style)
        key = rotate(key, *part.key_angles, rotation.is_neox_style)
    num_rows, num_heads, head_size = query.shape
    num_kv_heads = cache.key.shape[1]
    heads = (1, -1, num_kv_heads, num_heads // num_kv_heads, head_size)
    key, value = (
        half.reshape(1, -1, num_kv_heads, 1, head_size).expand(heads) for half in (key, value)
    )
    query = functional.pad(query, (0, 0, 0, 0, 0, part.padding)).reshape(heads)
    result, lse = fmha.memory_efficient_attention_partial(
        query, key, value, part.bias, scale=scale, op=part.operator
    )
    return result[:, :num_rows], lse[..., :num_rows].float()


def _owners(starts: torch.Tensor, lens: torch.Tensor, num_tokens: int) -> TensorPair:
    """Request and position of every row; -1 is the position of padding."""
    row = torch.arange(num_tokens, dtype=torch.int32, device=starts.device)
    request = torch.searchsorted(starts[1:], row, right=True, out_int32=True)
    request = request.clamp(max=lens.shape[0] - 1)
    position = lens[request] - starts[request + 1] + row
    return request, position.masked_fill(row >= starts[-1], -1)


def _prefix_slots(batch: DeviceBatch, n_global: int, page: int, block_size: int) -> TensorPair:
    """Block and offset of the global keys, [num_requests, page]. In place of a token that isn't
    there stands the first one: a kernel loads whole tiles, and a weight of 0 times NaN is NaN."""
    token = torch.arange(page, device=batch.block_table.device)
    has_rows = batch.query_start_loc.diff()[:, None] > 0
    is_there = (token < n_global) & (token < batch.seq_lens[:, None]) & has_rows
    token = token.where(is_there, 0)
    block = batch.block_table.gather(1, token // block_size)
    # Requests of padding have no blocks.
    return block.masked_fill(~has_rows, 0).long(), token % block_size


class _LongRequests:
    """Parts of requests with more than a few queries, whose lengths are read on the host."""

    def __init__(
        self, batch: DeviceBatch, num_tokens: int, device: torch.device, operators: Operators
    ) -> None:
        starts, lens = batch.query_start_loc_cpu, batch.seq_lens_cpu
        starts = (batch.query_start_loc if starts is None else starts).cpu()
        self._lens = (batch.seq_lens if lens is None else lens).cpu()
        self._counts = starts.diff()
        self._is_long = self._counts > FEW_QUERIES
        self._request, self._position = _owners(starts, self._lens, num_tokens)
        self._in_long = self._is_long[self._request] & (self._position >= 0)
        self._batch, self._device, self._packed = batch, device, operators.packed

    def others(self, first: int = 0, end: int = 0) -> torch.Tensor:
        """Rows of requests with a few queries, and these requests' at positions [first, end)."""
        is_inside = (first <= self._position) & (self._position < end)
        return self._rows((self._position >= 0) & (~self._in_long | is_inside))

    def window(self, pattern: LambdaPattern, block_size: int) -> list[Part]:
        """All their rows, over the keys of their windows."""
        queries, ends = self._counts[self._is_long], self._lens[self._is_long]
        starts = (ends - queries - pattern.n_local + 1).clamp(min=0)
        keys = ends - starts
        bias = attn_bias.BlockDiagonalMask.from_seqlens(
            queries.tolist(), keys.tolist(), device=self._device
        ).make_local_attention_from_bottomright(pattern.n_local)
        request = self._is_long.nonzero().flatten().repeat_interleave(keys)
        position = torch.arange(len(request), device="cpu")
        position += (ends - keys.cumsum(0)).repeat_interleave(keys)
        request, position = (x.to(self._device, non_blocking=True) for x in (request, position))
        block = self._batch.block_table[request, position // block_size].long()
        rows = None if self._in_long.all() else self._rows(self._in_long)
        return [Part(bias, self._packed, rows, slots=(block, position % block_size))]

    def prefix(self, first: int, n_global: int, page: int) -> list[Part]:
        """Their rows from position ``first`` on, if any, over all global keys."""
        is_far = self._in_long & (self._position >= first)
        counts = torch.bincount(self._request[is_far], minlength=len(self._lens))
        (requests,) = counts.nonzero(as_tuple=True)
        if len(requests) == 0:
            return []
        bias = attn_bias.BlockDiagonalGappyKeysMask.from_seqlens(
            counts[requests].tolist(),
            [*(requests * page).tolist(), len(self._lens) * page],
            [n_global] * len(requests),
            device=self._device,
        )
        return [Part(bias, self._packed, self._rows(is_far))]

    def _rows(self, mask: torch.Tensor) -> torch.Tensor:
        return mask.nonzero().flatten().to(self._device, non_blocking=True)


class _PagedParts:
    """Parts in which each row is a sequence of its own, and sees one range of keys. Ranges are
    given for all rows; those that end before they start are empty."""

    def __init__(
        self, batch: DeviceBatch, num_tokens: int, num_kv_heads: int, operators: Operators
    ) -> None:
        self._table = batch.block_table
        self._request, self.position = _owners(batch.query_start_loc, batch.seq_lens, num_tokens)
        # Sequences and heads are one dimension of a CUDA grid, which has 65535 programs at most.
        self._max_rows = 1 << ((65535 // num_kv_heads).bit_length() - 1)
        self._operator = operators.paged

    def of(
        self,
        rows: torch.Tensor | None,
        start: torch.Tensor,
        end: torch.Tensor,
        page: int,
        pages_per_block: int = 1,
        longest: int | None = None,
    ) -> list[Part]:
        """``rows`` (None: all) see the keys [start, end): at most ``longest``, in the blocks of the
        cache; where ``longest`` is None, in a page that each request has."""
        start = start.clamp(min=0)
        # An empty range starts at 0: within a tile the split-KV kernel takes no other.
        start, end = (x.masked_fill(start >= end, 0) for x in (start, end))
        if rows is None and len(start) > self._max_rows:
            rows = torch.arange(len(start), device=start.device)
        parts = []
        for chunk in [None] if rows is None else rows.split(self._max_rows):
            index = slice(None) if chunk is None else chunk
            pages, first, last = self._request[index, None], start[index], end[index]
            if len(first) == 0:
                continue
            if longest is not None:
                # Of the table, what a range lies in: the cost doesn't grow with the sequence.
                skipped = first // page
                columns = torch.arange(cdiv(longest - 1, page) + 1, device=first.device)
                blocks = skipped[:, None] + columns
                is_used = blocks * page < last[:, None]
                pages = self._table[pages, blocks.clamp(max=self._table.shape[1] - 1)]
                pages = pages.masked_fill(~is_used, 0) * pages_per_block
                first, last = first - skipped * page, last - skipped * page
            padding = (1 << (len(first) - 1).bit_length()) - len(first)
            first, last = (functional.pad(x, (0, padding)).int() for x in (first, last))
            bias = _paged_bias(first, last, functional.pad(pages, (0, 0, 0, padding)).int(), page)
            tile = next(size for size in (64, 32, 16) if page % size == 0)
            operator = self._operator.get_operator(None, block_n=tile)
            parts.append(Part(bias, operator, chunk, padding))
        return parts


def _paged_bias(
    start: torch.Tensor, end: torch.Tensor, pages: torch.Tensor, page_size: int
) -> attn_bias.PagedBlockDiagonalGappyKeysMask:
    """One query a sequence, which sees the keys [start, end) of its row of pages; int32
    [num_sequences] and [num_sequences, columns].

    Private in xformers: biases are made of lists of lengths, which would have to come from the
    device. The split-KV kernel reads the tensors made of these lists and nothing else: ``seqstart``
    of the queries, ``seqstart`` and ``seqlen`` (for pages: the end) of the keys. The true ones are
    put in place of those of meaningless lists. (``from_seqlens`` of the paged bias itself refuses
    whatever it is given, in 0.0.35.)
    """
    count = start.shape[0]
    unpaged = attn_bias.BlockDiagonalGappyKeysMask.from_seqlens(
        [1] * count, [0] * (count + 1), [0] * count, device=torch.device("cpu")
    )
    queries = torch.arange(count + 1, dtype=torch.int32, device=start.device)
    return attn_bias.PagedBlockDiagonalGappyKeysMask(
        replace(unpaged.q_seqinfo, seqstart=queries),
        replace(unpaged.k_seqinfo, seqstart=functional.pad(start, (0, 1)), seqlen=end),
        pages,
        page_size,
    )
