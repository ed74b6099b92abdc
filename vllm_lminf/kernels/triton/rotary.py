"""Rotary embedding of the queries and keys of a step by exact angles, in one launch.

What is read and written is the heads themselves: ``4 * head_size`` bytes a head in 16 bits, out of
place, as a rotation by a table's row needs too. A position's angles are three rows of the tables,
``24 * rotary_dim / 2`` bytes for every token, of 4 MB at the most that all layers share and that
stay in the L2 cache.

Also an operator of torch's, ``lminf::rotary_embedding``: vLLM cuts a model's graph at every
attention before it compiles the pieces, where nothing computed from the positions alone is shared,
so that a layer's rotation must be one launch on its own.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code=misc

import torch
import triton
import triton.language as tl

from vllm_lminf.kernels.triton.angles import angles_of
from vllm_lminf.kernels.triton.plan import power_of_two
from vllm_lminf.pattern import cdiv

_TILE_ELEMENTS = 4096
"""Of a program, which are 32 for a thread."""


@triton.jit
def _rotate(
    heads, rotated, position, angles, magnitude, first_head, stride_head,
    NUM_HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, IS_NEOX: tl.constexpr,
):  # fmt: skip
    """Some heads of one token."""
    head = first_head + tl.arange(0, TILE_HEADS)
    there = (head < NUM_HEADS)[:, None]
    source = heads + head.to(tl.int64)[:, None] * stride_head
    target = rotated + head[:, None] * HEAD_SIZE
    if IS_NEOX:
        pair = tl.arange(0, PAIRS)
        cos, sin = angles_of(angles, position, tl.zeros((1,), tl.int32), pair, HALF)
        cos, sin = cos * magnitude, sin * magnitude
        mask = there & (pair < HALF)[None, :]
        one = tl.load(source + pair[None, :], mask=mask).to(tl.float32)
        other = tl.load(source + HALF + pair[None, :], mask=mask).to(tl.float32)
        rotated_one, rotated_other = one * cos - other * sin, other * cos + one * sin
        narrow = rotated.dtype.element_ty
        tl.store(target + pair[None, :], rotated_one.to(narrow), mask=mask)
        tl.store(target + HALF + pair[None, :], rotated_other.to(narrow), mask=mask)
        if HEAD_SIZE > 2 * HALF:
            dims = tl.arange(0, DIMS)[None, :]
            mask = there & (dims >= 2 * HALF) & (dims < HEAD_SIZE)
            tl.store(target + dims, tl.load(source + dims, mask=mask), mask=mask)
    else:
        pair = tl.arange(0, DIMS // 2)
        cos, sin = angles_of(angles, position, tl.zeros((1,), tl.int32), pair, HALF)
        # Pairs that aren't rotated have the angle 0, and no magnitude.
        factor = tl.where(pair < HALF, magnitude, 1.0)[None, :]
        cos, sin = cos * factor, sin * factor
        dims = tl.arange(0, DIMS)[None, :]
        mask = there & (dims < HEAD_SIZE)
        x = tl.load(source + dims, mask=mask).to(tl.float32)
        one, other = tl.split(tl.reshape(x, (TILE_HEADS, DIMS // 2, 2)))
        x = tl.join(one * cos - other * sin, other * cos + one * sin)
        x = tl.reshape(x, (TILE_HEADS, DIMS))
        tl.store(target + dims, x.to(rotated.dtype.element_ty), mask=mask)


@triton.jit(
    # What changes with the number of tokens: a kernel is compiled once for all values.
    do_not_specialize=[
        "stride_query_token", "stride_query_head", "stride_key_token", "stride_key_head",
    ],
    do_not_specialize_on_alignment=["positions"],
)  # fmt: skip
def rotary_kernel(
    positions, angles, query, key, rotated_query, rotated_key, magnitude,
    stride_query_token, stride_query_head, stride_key_token, stride_key_head,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, QUERY_TILES: tl.constexpr,
    TILE_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr,
    HALF: tl.constexpr, PAIRS: tl.constexpr, IS_NEOX: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """TILE_HEADS heads of one token; grid (tokens, tiles of query heads, then of key heads).

    Args:
        positions: integers [tokens]; those that have no row in the tables read some other row.
        angles: int64 [4096, HALF], the tables, see `angles`.
        rotated_query, rotated_key: [tokens, heads, HEAD_SIZE], contiguous.
        magnitude: factor on every rotated dimension.
        ALIGNMENT: what the strides, which are divided by it, are multiples of. (A hint about an
            argument is lost: Triton takes them of what is computed.)
    """
    stride_query_token *= ALIGNMENT
    stride_query_head *= ALIGNMENT
    stride_key_token *= ALIGNMENT
    stride_key_head *= ALIGNMENT
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    position = tl.load(positions + token).to(tl.int32)
    if tile < QUERY_TILES:
        _rotate(
            query + token * stride_query_token, rotated_query + token * (NUM_HEADS * HEAD_SIZE),
            position, angles, magnitude, tile * TILE_HEADS, stride_query_head,
            NUM_HEADS, TILE_HEADS, HEAD_SIZE, DIMS, HALF, PAIRS, IS_NEOX,
        )  # fmt: skip
    elif NUM_KV_HEADS > 0:
        _rotate(
            key + token * stride_key_token, rotated_key + token * (NUM_KV_HEADS * HEAD_SIZE),
            position, angles, magnitude, (tile - QUERY_TILES) * TILE_HEADS, stride_key_head,
            NUM_KV_HEADS, TILE_HEADS, HEAD_SIZE, DIMS, HALF, PAIRS, IS_NEOX,
        )  # fmt: skip


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    tables: torch.Tensor,
    head_size: int,
    is_neox_style: bool,
    magnitude: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries and keys.

    Args:
        positions: integers [num_tokens], each in [0, 2**31).
        query: [num_tokens, num_heads * head_size] or [num_tokens, num_heads, head_size]; may be a
            slice of something wider.
        key: the same for the key heads, or None.
        tables: see `vllm_lminf.rope.RotationTables`.
        head_size: dimensions of a head.
        is_neox_style: how pairs are laid out, see `vllm_lminf.rope.RotarySpec`.
        magnitude: likewise.

    Returns:
        New contiguous tensors of query's and key's shapes and dtypes; without a key, the second is
        empty.
    """
    rotated_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    rotated_key = query.new_empty(0)
    num_tokens = positions.shape[0]
    heads = _as_heads(query, num_tokens, head_size)
    kv_heads, num_kv_heads = None, 0
    key_strides: tuple[int, ...] = (0, 0)
    if key is not None:
        rotated_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
        kv_heads = _as_heads(key, num_tokens, head_size)
        num_kv_heads, key_strides = kv_heads.shape[1], kv_heads.stride()[:2]
    num_heads = heads.shape[1]
    if num_tokens == 0:
        return rotated_query, rotated_key
    half, dims = tables.shape[1], power_of_two(head_size)
    tile_heads = max(1, min(power_of_two(max(num_heads, num_kv_heads)), _TILE_ELEMENTS // dims))
    query_tiles = cdiv(num_heads, tile_heads)
    strides = *heads.stride()[:2], *key_strides
    alignment = 1 if any(stride % 8 for stride in strides) else 8
    rotary_kernel[num_tokens, query_tiles + cdiv(num_kv_heads, tile_heads)](
        positions, tables.view(torch.int64).squeeze(-1), heads, kv_heads, rotated_query,
        None if key is None else rotated_key, magnitude,
        *(stride // alignment for stride in strides),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, QUERY_TILES=query_tiles,
        TILE_HEADS=tile_heads, HEAD_SIZE=head_size, DIMS=dims, HALF=half,
        PAIRS=power_of_two(half), IS_NEOX=is_neox_style,
        ALIGNMENT=alignment,
    )  # fmt: skip
    return rotated_query, rotated_key


def _as_heads(x: torch.Tensor, num_tokens: int, head_size: int) -> torch.Tensor:
    heads = x.reshape(num_tokens, x.numel() // max(1, num_tokens * head_size), head_size)
    return heads if heads.stride(2) == 1 else heads.contiguous()


@torch.library.custom_op("lminf::rotary_embedding", mutates_args=())
def _rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    tables: torch.Tensor,
    head_size: int,
    is_neox_style: bool,
    magnitude: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_embedding(positions, query, key, tables, head_size, is_neox_style, magnitude)


@_rotary_embedding.register_fake
def _(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    tables: torch.Tensor,
    head_size: int,
    is_neox_style: bool,
    magnitude: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    rotated_key = query.new_empty(0) if key is None else key.new_empty(key.shape)
    return query.new_empty(query.shape), rotated_key
