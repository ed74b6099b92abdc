"""Λ-attention over a paged KV cache, in plain PyTorch, for any device.

A request's window is gathered into one contiguous stretch and attended tile by tile; the few
global keys behind it form a second branch, whose queries are rotated to the distance limit and
whose keys are rotated back to position 0. The two branches are joined through their log-sum-exps,
so that together they are one softmax over every visible key.

In a layer that recalls from the middle, what a query recalls is a third branch, which is joined in
the same way: see `vllm_lminf.kernels.recall`.

Cache slots outside the visible keys are never read into a score or a value: they may hold
anything, NaN included.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_lminf.kernels.archive import RecallBatch
from vllm_lminf.kernels.base import DeviceBatch, Kernel, LayerConfig, PagedCache, ScoreRules
from vllm_lminf.kernels.host_batch import HostBatch, InverseRotations
from vllm_lminf.kernels.pages import gather
from vllm_lminf.kernels.recall import LookingQueries, without_rotation
from vllm_lminf.pattern import LambdaPattern

_MAX_TILE = 512
_MIN_TILE = 128


class ReferenceKernel(Kernel):
    """See the module. It goes through a batch on the host, which means on a GPU that the first
    layer of every step waits for the device."""

    block_multiple: ClassVar[int] = 1
    recalls: ClassVar[bool] = True

    @classmethod
    def unsupported_reasons(cls, layer: LayerConfig) -> list[str]:
        reasons = []
        if layer.cache_dtype.itemsize == 1:
            name = str(layer.cache_dtype).removeprefix("torch.")
            reasons.append(f"it keeps the cache in 16 or 32 bits, not in {name}")
        if layer.middle is not None:
            reasons += _reasons_against_recalling(layer)
        return reasons

    def __init__(self, layer: LayerConfig) -> None:
        self._layer = layer
        self._pattern = layer.pattern
        self._rules = layer.rules
        self._rotation = layer.far_rotation

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: PagedCache,
        slot_mapping: torch.Tensor,
    ) -> None:
        """See `Kernel`, and `_store` for tokens without a slot: block 0 stands for blocks that were
        freed."""
        _store(key, value, cache, slot_mapping)

    def attend(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
    ) -> None:
        for _, rows, tiles in self._requests(query, cache, batch):
            tiles.attend(output[rows])

    def write_archive(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        archive: torch.Tensor,
        batch: DeviceBatch,
        recall: RecallBatch,
    ) -> None:
        """See `Kernel`. The index is left alone."""
        positions = HostBatch.of(batch).positions
        num_tokens = len(positions)
        still = without_rotation(key[:num_tokens], positions, self._layer.rotation)
        _store(still, value, self._kept(archive), recall.slot_mapping[:num_tokens])

    def attend_and_recall(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DeviceBatch,
        archive: torch.Tensor,
        recall: RecallBatch,
        output: torch.Tensor,
    ) -> None:
        kept, first_rows = self._kept(archive), recall.first_rows.tolist()
        for request, rows, tiles in self._requests(query, cache, batch):
            tiles.looking = LookingQueries.of(
                self._layer,
                query[rows],
                tiles.seq_len,
                first_rows[request],
                kept,
                recall.block_table[request],
            )
            tiles.attend(output[rows])

    def _requests(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch
    ) -> Iterator[tuple[int, slice, "_RequestTiles"]]:
        """Every request that has queries: its number, its rows, and what is done with them."""
        host, pattern, rotation = HostBatch.of(batch), self._pattern, self._rotation
        inverse = None if rotation is None else host.inverse_rotations(rotation, pattern)
        query_start_loc = host.query_start_loc.tolist()
        for request, seq_len in enumerate(host.seq_lens.tolist()):
            start, end = query_start_loc[request], query_start_loc[request + 1]
            if start == end:
                continue
            # The first query's window reaches back furthest; the last has most behind its own.
            _, window = pattern.intervals(seq_len - (end - start))
            behind, _ = pattern.intervals(seq_len - 1)
            row = batch.block_table[request]
            tiles = _RequestTiles(
                query[start:end],
                gather(cache.key, row, window.start, seq_len),
                gather(cache.value, row, window.start, seq_len),
                gather(cache.key, row, behind.start, behind.stop),
                gather(cache.value, row, behind.start, behind.stop),
                seq_len,
                pattern,
                self._rules,
                inverse and inverse.of_rows(start, end),
            )
            yield request, slice(start, end), tiles

    def _kept(self, archive: torch.Tensor) -> PagedCache:
        return PagedCache(*self._layer.archive_format.kept(archive))


def _reasons_against_recalling(layer: LayerConfig) -> list[str]:
    reasons = []
    if layer.rules.alibi_slopes is not None:
        reasons.append("it recalls nothing from the middle with ALiBi: set middle_top_k to 0")
    if layer.rules.sinks is not None:
        reasons.append("it recalls nothing from the middle with sinks: set middle_top_k to 0")
    if layer.block_size % 16:
        reasons.append(
            f"blocks of {layer.block_size} tokens: those of the archive are of multiples of 16"
        )
    if layer.heads.head_size % 16:
        reasons.append(
            f"heads of {layer.heads.head_size} dimensions: those of the archive are of multiples "
            "of 16; set middle_top_k to 0"
        )
    return reasons


def _store(
    key: torch.Tensor, value: torch.Tensor, cache: PagedCache, slot_mapping: torch.Tensor
) -> None:
    """Stores keys and values in their slots. Off the CPU, where to look for a token without a slot
    would wait for the device, such a token is stored in slot 0, which nobody reads.

    Args:
        key, value: [>= num_tokens, num_kv_heads, head_size].
        cache: written in place.
        slot_mapping: [num_tokens]; negative for a token without a slot.
    """
    num_tokens = slot_mapping.shape[0]
    key, value = key[:num_tokens], value[:num_tokens]
    if slot_mapping.device.type != "cpu":
        slot_mapping = slot_mapping.clamp(min=0)
    elif bool((slot_mapping < 0).any()):
        has_slot = slot_mapping >= 0
        key, value, slot_mapping = key[has_slot], value[has_slot], slot_mapping[has_slot]
    block_size = cache.key.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    cache.key[block, :, offset] = key.to(cache.key.dtype)
    cache.value[block, :, offset] = value.to(cache.value.dtype)


@dataclass
class _RequestTiles:
    """One request's queries, and the keys that they see between them.

    Attributes:
        query: rotated; [num_queries, num_heads, head_size]; the request's latest tokens.
        key, value: [num_kv_heads, num_keys, head_size]: from the first query's window to the end.
        global_key, global_value: [num_kv_heads, num_global, head_size]: the global tokens that the
            last query sees behind its window.
        seq_len: the position after the last query.
        pattern, rules: what is computed.
        inverse: rotations of these queries and the global keys to the limit; None without RoPE.
        looking: those of the queries that recall something from the middle, if any does.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    global_key: torch.Tensor
    global_value: torch.Tensor
    seq_len: int
    pattern: LambdaPattern
    rules: ScoreRules
    inverse: InverseRotations | None
    looking: LookingQueries | None = None

    def attend(self, output: torch.Tensor) -> None:
        """Writes the attention of all queries, tile by tile; output is of query's shape."""
        pattern = self.pattern
        num_queries, num_keys = self.query.shape[0], self.key.shape[1]
        tile = min(max(pattern.n_local // 4, _MIN_TILE), _MAX_TILE)
        for start in range(0, num_queries, tile):
            rows = slice(start, min(start + tile, num_queries))
            first = self.seq_len - num_queries + rows.start
            end = self.seq_len - num_queries + rows.stop
            keys = slice(
                pattern.window_start(first) - (self.seq_len - num_keys),
                end - (self.seq_len - num_keys),
            )
            local, lse = _attend_tile(
                self.query[rows],
                self.key[:, keys],
                self.value[:, keys],
                end,
                pattern.n_local,
                self.rules,
            )
            if self.global_key.shape[1] > 0 and pattern.window_start(end - 1) > 0:
                local, lse = self._join_global_branch(local, lse, rows, first)
            if self.looking is not None:
                local, lse = self._join_recalled(self.looking, local, lse, first)
            if self.rules.sinks is not None:
                joint = torch.logaddexp(lse, self.rules.sinks.to(lse.dtype))
                local = local * (lse - joint).exp()[..., None]
            output[rows] = local.to(output.dtype)

    def _join_global_branch(
        self, local: torch.Tensor, local_lse: torch.Tensor, rows: slice, first_position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Joins the global keys behind the window into a tile's window attention.

        With ``w`` the window's share of the joint softmax, the result is ``w * local`` plus the
        global values under their own weights; both follow from one log-sum-exp over the branches.

        Args:
            local: the window's output [num_rows, num_heads, head_size].
            local_lse: its log-sum-exp [num_rows, num_heads].
            rows: which of the queries these are.
            first_position: position of the first of them.

        Returns:
            The joint output and log-sum-exp, in local_lse's dtype.
        """
        wide = local_lse.dtype
        query, key = self.query[rows].to(wide), self.global_key.to(wide)
        num_rows, num_heads, head_size = query.shape
        num_kv_heads, num_global, _ = key.shape
        grouped = (num_rows, num_kv_heads, num_heads // num_kv_heads, head_size)
        position = torch.arange(first_position, first_position + num_rows, device=query.device)
        difference = position[:, None] - torch.arange(num_global, device=query.device)

        scores = torch.einsum("rhgd,hnd->rhgn", query.view(grouped), key)
        if self.inverse is not None:
            clamped_query = self.inverse.rotate_queries(query, rows).view(grouped)
            clamped_key = self.inverse.rotate_keys(key)
            clamped = torch.einsum("rhgd,hnd->rhgn", clamped_query, clamped_key)
            beyond = difference > self.pattern.distance_limit
            scores = torch.where(beyond[:, None, None], clamped, scores)
        scores = self._scaled(scores)
        if self.rules.alibi_slopes is not None:
            distance = difference.clamp(max=self.pattern.distance_limit)
            slopes = self.rules.alibi_slopes.to(wide).view(num_kv_heads, -1, 1)
            scores = scores - slopes * distance[:, None, None]
        in_window = difference < self.pattern.n_local
        scores = scores.masked_fill(in_window[:, None, None], -math.inf)

        return _join(local, local_lse, scores, self.global_value)

    def _join_recalled(
        self,
        looking: LookingQueries,
        local: torch.Tensor,
        local_lse: torch.Tensor,
        first_position: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Joins what a tile's queries recall from the middle into what they see.

        Args:
            looking: those that recall something.
            local: the output so far [num_rows, num_heads, head_size].
            local_lse: its log-sum-exp [num_rows, num_heads].
            first_position: position of the first query.

        Returns:
            The joint output and log-sum-exp, in local_lse's dtype.
        """
        joint, joint_lse = local.to(local_lse.dtype), local_lse.clone()
        for start, stop in looking.tiles(first_position, first_position + len(local)):
            products, is_recalled, value = looking.recalled(start, stop)
            scores = self._scaled(products).masked_fill(~is_recalled, -math.inf)
            rows = slice(start - first_position, stop - first_position)
            joint[rows], joint_lse[rows] = _join(joint[rows], joint_lse[rows], scores, value)
        return joint, joint_lse

    def _scaled(self, products: torch.Tensor) -> torch.Tensor:
        """Products of queries and keys as scores, but for a bias."""
        scores = products * self.rules.scale
        if self.rules.softcap is not None:
            scores = self.rules.softcap * (scores / self.rules.softcap).tanh()
        return scores


def _join(
    local: torch.Tensor, local_lse: torch.Tensor, scores: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins further keys into an attention.

    Args:
        local: the output without them [num_rows, num_heads, head_size].
        local_lse: its log-sum-exp [num_rows, num_heads].
        scores: of the keys [num_rows, num_kv_heads, group, num_keys]; minus infinity for a key that
            a query doesn't see.
        value: of the keys [num_kv_heads, num_keys, head_size].

    Returns:
        The joint output and log-sum-exp, in local_lse's dtype.
    """
    num_rows, num_kv_heads, group, _ = scores.shape
    lse = local_lse.view(num_rows, num_kv_heads, group)
    joint_lse = torch.logaddexp(lse, scores.logsumexp(dim=-1))
    weights = (scores - joint_lse[..., None]).exp()
    joint = torch.einsum("rhgn,hnd->rhgd", weights, value.to(lse.dtype))
    joint = joint + (lse - joint_lse).exp()[..., None] * local.view(*lse.shape, -1)
    return joint.reshape(local.shape), joint_lse.reshape(local_lse.shape)


def _attend_tile(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tile_end: int,
    n_local: int,
    rules: ScoreRules,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Window attention of consecutive queries over consecutive keys that both end at tile_end.

    Heads that share a key head are folded into the rows, so that no key is repeated.

    Args:
        query: shape [rows, num_heads, head_size].
        key: shape [num_kv_heads, keys, head_size].
        value: same shape.
        tile_end: the position after the last query and the last key.
        n_local: the window, in tokens.
        rules: how products become scores; sinks are left to the caller.

    Returns:
        The output [rows, num_heads, head_size] and the log-sum-exp of the scores, float32 or wider,
        [rows, num_heads].
    """
    rows, num_heads, head_size = query.shape
    num_kv_heads, num_keys, _ = key.shape
    group = num_heads // num_kv_heads
    folded = query.view(rows, num_kv_heads, group, head_size).permute(1, 2, 0, 3)
    folded = folded.reshape(1, num_kv_heads, group * rows, head_size)
    bias = _window_bias(rows, num_keys, tile_end, n_local, rules.alibi_slopes, query)
    if bias is not None:
        # From [num_heads or 1, rows, keys] to [1, num_kv_heads or 1, group * rows, keys].
        bias = bias.expand(group if bias.shape[0] == 1 else -1, -1, -1)
        bias = bias.reshape(1, -1, group * rows, num_keys)
    if query.device.type == "cpu" and rules.softcap is None:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            folded, key[None], value[None], 0.0, False, attn_mask=bias, scale=rules.scale
        )
    else:
        out, lse = _eager_attention(folded, key[None], value[None], bias, rules)
    out = out.view(num_kv_heads, group, rows, head_size).permute(2, 0, 1, 3)
    lse = lse.view(num_kv_heads, group, rows).permute(2, 0, 1)
    return out.reshape(rows, num_heads, head_size), lse.reshape(rows, num_heads)


def _window_bias(
    rows: int,
    num_keys: int,
    tile_end: int,
    n_local: int,
    alibi_slopes: torch.Tensor | None,
    query: torch.Tensor,
) -> torch.Tensor | None:
    """What is added to a tile's scores: minus infinity outside the window, and ALiBi inside.

    Returns:
        Shape [1, rows, num_keys], or [num_heads, rows, num_keys] with ALiBi; None for nothing to
        add. In query's dtype without ALiBi, whose biases need float32.
    """
    if rows == 1 and alibi_slopes is None:
        return None
    i = torch.arange(tile_end - rows, tile_end, device=query.device)
    difference = i[:, None] - torch.arange(tile_end - num_keys, tile_end, device=query.device)
    hidden = (difference < 0) | (difference >= n_local)
    if alibi_slopes is None:
        bias = torch.zeros_like(hidden, dtype=query.dtype)
    else:
        bias = -alibi_slopes[:, None, None] * difference
        bias = bias.to(torch.promote_types(query.dtype, torch.float32))
    return bias.masked_fill(hidden, -math.inf).view(-1, rows, num_keys)


def _eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    rules: ScoreRules,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its log-sum-exp where no fused operator serves.

    Scores are formed in float32 or wider: before the scale is applied they can exceed float16.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(dtype) * rules.scale) @ key.to(dtype).transpose(-1, -2)
    if rules.softcap is not None:
        scores = rules.softcap * (scores / rules.softcap).tanh()
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse
