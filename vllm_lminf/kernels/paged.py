"""Λ-attention over a paged KV cache, in plain PyTorch, for any device.

A request's window is gathered into one contiguous stretch and attended tile by tile; the few
global keys behind it form a second branch, whose queries are turned to the distance limit and
whose keys are turned back to position 0. The two branches are joined through their log-sum-exps,
so that together they are one softmax over every visible key.

Cache slots outside the visible keys are never read into a score or a value: they may hold
anything, NaN included.
"""

import math
from dataclasses import dataclass

import torch

from vllm_lminf.pattern import LambdaPattern, cdiv
from vllm_lminf.rope import RotationTables, rotate

_MAX_TILE = 512
_MIN_TILE = 64


@dataclass
class FarRotations:
    """Rotations that move a far pair to the distance limit; the same for every layer of a model.

    Attributes:
        query_cos, query_sin: float32 [num_tokens, rotary_dim / 2]: turn a rotated query at
            position ``i >= limit`` back by ``i - limit``, that is to the angle of ``limit``.
            A nearer query, which has no pair beyond the limit, is left as it is.
        key_cos, key_sin: float32 [n_global, rotary_dim / 2]: turn a rotated global key at ``j``
            back by ``j``, that is to the angle of 0.
        is_neox_style: how rotated pairs are laid out.
    """

    query_cos: torch.Tensor
    query_sin: torch.Tensor
    key_cos: torch.Tensor
    key_sin: torch.Tensor
    is_neox_style: bool


def far_rotations(
    tables: RotationTables, is_neox_style: bool, positions: torch.Tensor, pattern: LambdaPattern
) -> FarRotations:
    """The rotations for queries at ``positions`` (integers [num_tokens]) under this Λ."""
    query_cos, query_sin = tables((positions - pattern.distance_limit).clamp(min=0))
    key_cos, key_sin = tables(torch.arange(pattern.n_global, device=positions.device))
    return FarRotations(query_cos, -query_sin, key_cos, -key_sin, is_neox_style)


def split_cache(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value halves of a cache, as views.

    Args:
        kv_cache: shape [num_blocks, num_kv_heads, block_size, 2 * head_size], contiguous in its
            last three dimensions. Each head of a block stores all keys, then all values.

    Returns:
        Two views of shape [num_blocks, num_kv_heads, block_size, head_size].
    """
    num_blocks, num_kv_heads, block_size, double = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size, double // 2)
    return halves[:, :, 0], halves[:, :, 1]


def write_cache(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Stores keys and values in their slots.

    Args:
        key: shape [>= num_tokens, num_kv_heads, head_size]; rows past num_tokens are padding.
        value: same shape.
        kv_cache: see `split_cache`; written in place.
        slot_mapping: integers [num_tokens]: ``block * block_size + offset`` of every token, or a
            negative number for a token that has no slot.
    """
    num_tokens = slot_mapping.shape[0]
    key, value = key[:num_tokens], value[:num_tokens]
    if slot_mapping.device.type == "cpu" and bool((slot_mapping < 0).any()):
        has_slot = slot_mapping >= 0
        key, value, slot_mapping = key[has_slot], value[has_slot], slot_mapping[has_slot]
    key_cache, value_cache = split_cache(kv_cache)
    block, offset = slot_mapping // kv_cache.shape[2], slot_mapping % kv_cache.shape[2]
    key_cache[block, :, offset] = key.to(kv_cache.dtype)
    value_cache[block, :, offset] = value.to(kv_cache.dtype)


def lambda_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: list[int],
    seq_lens: list[int],
    pattern: LambdaPattern,
    *,
    scale: float,
    far: FarRotations | None,
    output: torch.Tensor,
) -> None:
    """Attention of a batch of requests, prefill and decode mixed freely.

    Args:
        query: rotated by its true position; shape [num_tokens, num_heads, head_size].
        kv_cache: rotated keys and values, see `split_cache`.
        block_table: integers [num_requests, max_blocks]. Entries of blocks that were freed are
            never read.
        query_start_loc: num_requests + 1 offsets into query; request r owns the rows from
            ``query_start_loc[r]`` to ``query_start_loc[r + 1]``, its latest tokens.
        seq_lens: tokens of every request in the cache, these queries' own included.
        pattern: the Λ.
        scale: factor on every score.
        far: rotations for the far pairs; None where the model has no positional encoding, so that
            a far pair scores as any other.
        output: written in place; shape [num_tokens, num_heads, head_size].
    """
    for request, seq_len in enumerate(seq_lens):
        start, end = query_start_loc[request], query_start_loc[request + 1]
        if start == end:
            continue
        first_position = seq_len - (end - start)
        _attend_window(
            query[start:end],
            kv_cache,
            block_table[request],
            first_position,
            seq_len,
            pattern,
            scale,
            output[start:end],
            far if far is None else _slice_queries(far, start, end),
        )


def _slice_queries(far: FarRotations, start: int, end: int) -> FarRotations:
    return FarRotations(
        far.query_cos[start:end],
        far.query_sin[start:end],
        far.key_cos,
        far.key_sin,
        far.is_neox_style,
    )


def _attend_window(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_row: torch.Tensor,
    first_position: int,
    seq_len: int,
    pattern: LambdaPattern,
    scale: float,
    output: torch.Tensor,
    far: FarRotations | None,
) -> None:
    """One request: its window, tile by tile, then the global keys behind each tile's window."""
    window_start = pattern.window_start(first_position)
    key, value = _gather(kv_cache, block_row, window_start, seq_len)
    num_global = min(pattern.n_global, pattern.window_start(seq_len - 1))
    global_key, global_value = _gather(kv_cache, block_row, 0, num_global)
    tile = min(max(pattern.n_local // 4, _MIN_TILE), _MAX_TILE)
    for tile_start in range(first_position, seq_len, tile):
        tile_end = min(tile_start + tile, seq_len)
        rows = slice(tile_start - first_position, tile_end - first_position)
        keys = slice(pattern.window_start(tile_start) - window_start, tile_end - window_start)
        local, local_lse = _attend_tile(
            query[rows], key[:, keys], value[:, keys], tile_end, pattern.n_local, scale
        )
        if pattern.window_start(tile_end - 1) > 0 and num_global > 0:
            _add_global_branch(
                local, local_lse, query[rows], rows, global_key, global_value,
                tile_start, pattern, scale, far,
            )  # fmt: skip
        output[rows] = local.to(output.dtype)


def _gather(
    kv_cache: torch.Tensor, block_row: torch.Tensor, start: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of positions [start, end): each [num_kv_heads, end - start, head_size].

    Only the slots of these positions are part of the result; the rest of their blocks is dropped.
    """
    num_blocks, num_kv_heads, block_size, double = kv_cache.shape
    first_block = start // block_size
    blocks = block_row[first_block : cdiv(end, block_size)].long()
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size, double // 2)
    gathered = halves.permute(1, 2, 0, 3, 4)[:, :, blocks].flatten(2, 3)
    skip = first_block * block_size
    return gathered[:, 0, start - skip : end - skip], gathered[:, 1, start - skip : end - skip]


def _attend_tile(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tile_end: int,
    n_local: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Window attention of consecutive queries over consecutive keys that both end at tile_end.

    Heads that share a key head are folded into the rows, so that no key is repeated.

    Args:
        query: shape [rows, num_heads, head_size].
        key: shape [num_kv_heads, keys, head_size].
        value: same shape.
        tile_end: the position after the last query and the last key.
        n_local: the window, in tokens.
        scale: factor on every score.

    Returns:
        The output [rows, num_heads, head_size] and the log-sum-exp of the scores, float32 or wider,
        [rows, num_heads].
    """
    rows, num_heads, head_size = query.shape
    num_kv_heads, num_keys, _ = key.shape
    group = num_heads // num_kv_heads
    folded = query.view(rows, num_kv_heads, group, head_size).permute(1, 2, 0, 3)
    folded = folded.reshape(1, num_kv_heads, group * rows, head_size)
    mask = None
    if rows > 1:
        i = torch.arange(tile_end - rows, tile_end, device=query.device)
        difference = i[:, None] - torch.arange(tile_end - num_keys, tile_end, device=query.device)
        hidden = (difference < 0) | (difference >= n_local)
        mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, -math.inf)
        mask = mask.repeat(group, 1)
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            folded, key[None], value[None], 0.0, False, attn_mask=mask, scale=scale
        )
    else:
        out, lse = _eager_attention(folded, key[None], value[None], mask, scale)
    out = out.view(num_kv_heads, group, rows, head_size).permute(2, 0, 1, 3)
    lse = lse.view(num_kv_heads, group, rows).permute(2, 0, 1)
    return out.reshape(rows, num_heads, head_size), lse.reshape(rows, num_heads)


def _eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its log-sum-exp where no fused operator returns one.

    Scores are formed in float32 or wider: before the scale is applied they can exceed float16.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(dtype) * scale) @ key.to(dtype).transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def _add_global_branch(
    local: torch.Tensor,
    local_lse: torch.Tensor,
    query: torch.Tensor,
    rows: slice,
    global_key: torch.Tensor,
    global_value: torch.Tensor,
    first_position: int,
    pattern: LambdaPattern,
    scale: float,
    far: FarRotations | None,
) -> None:
    """Joins the global keys behind the window into a tile's window attention, in place.

    With ``w`` the window's share of the joint softmax, the result is ``w * local`` plus the
    global values under their own weights; both come from one log-sum-exp over the two branches.

    Args:
        local: the window's output [rows, num_heads, head_size]; overwritten.
        local_lse: its log-sum-exp [rows, num_heads].
        query: rotated queries [rows, num_heads, head_size].
        rows: which rows of far's queries these are.
        global_key: rotated keys [num_kv_heads, num_global, head_size].
        global_value: values, same shape.
        first_position: position of the first row.
        pattern: the Λ.
        scale: factor on every score.
        far: rotations for pairs beyond the distance limit.
    """
    num_rows, num_heads, head_size = query.shape
    num_kv_heads, num_global, _ = global_key.shape
    wide = local_lse.dtype
    grouped = (num_rows, num_kv_heads, num_heads // num_kv_heads, head_size)
    key = global_key.to(wide)
    scores = torch.einsum("rhgd,hnd->rhgn", query.to(wide).view(grouped), key)
    position = torch.arange(first_position, first_position + num_rows, device=query.device)
    difference = position[:, None] - torch.arange(num_global, device=query.device)
    if far is not None:
        far_query = rotate(
            query.to(wide), far.query_cos[rows], far.query_sin[rows], far.is_neox_style
        )
        stationary = rotate(
            key.transpose(0, 1),
            far.key_cos[:num_global],
            far.key_sin[:num_global],
            far.is_neox_style,
        ).transpose(0, 1)
        far_scores = torch.einsum("rhgd,hnd->rhgn", far_query.view(grouped), stationary)
        beyond = difference > pattern.distance_limit
        scores = torch.where(beyond[:, None, None], far_scores, scores)
    in_window = difference < pattern.n_local
    scores = (scores * scale).masked_fill_(in_window[:, None, None], -math.inf)
    local_lse = local_lse.view(num_rows, num_kv_heads, -1)
    joint_lse = torch.logaddexp(local_lse, scores.logsumexp(dim=-1))
    weights = (scores - joint_lse[..., None]).exp()
    joined = torch.einsum("rhgn,hnd->rhgd", weights, global_value.to(wide))
    joined += (local_lse - joint_lse).exp()[..., None] * local.view(grouped)
    local.copy_(joined.reshape(local.shape))
