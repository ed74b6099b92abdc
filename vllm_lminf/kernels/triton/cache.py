"""Writes the keys and values of a step into their slots."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def _store(
    rows, scale, cache, kv_heads, dims, present, stride_row_head, stride_head, LARGEST: tl.constexpr
):
    """All heads of one token, [heads, dims], in the cache's dtype."""
    x = tl.load(rows + kv_heads[:, None] * stride_row_head + dims[None, :], mask=present)
    if scale is not None:
        x = x.to(tl.float32) / tl.load(scale)
    if LARGEST is not None:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -LARGEST), LARGEST)
    where = cache + kv_heads.to(tl.int64)[:, None] * stride_head + dims[None, :]
    tl.store(where, x.to(cache.dtype.element_ty), mask=present)


@triton.jit(
    do_not_specialize=[
        "stride_key_row", "stride_key_row_head", "stride_value_row", "stride_value_row_head",
    ],
    do_not_specialize_on_alignment=["slot_mapping"],
)  # fmt: skip
def write_kernel(
    key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale,
    stride_key_row, stride_key_row_head, stride_value_row, stride_value_row_head,
    stride_key_block, stride_key_head, stride_key_token,
    stride_value_block, stride_value_head, stride_value_token,
    NUM_KV_HEADS: tl.constexpr, TILE_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """One token's keys and values; grid (tokens, groups of TILE_HEADS heads).

    Args:
        key, value: rows of the batch, [tokens, heads, HEAD_SIZE]; strides are multiples of 8.
        slot_mapping: [tokens]; negative for a token that has no slot.
        LARGEST: the largest number of the cache's dtype if that may be exceeded, or None.
    """
    stride_key_row = tl.multiple_of(stride_key_row, 8)
    stride_key_row_head = tl.multiple_of(stride_key_row_head, 8)
    stride_value_row = tl.multiple_of(stride_value_row, 8)
    stride_value_row_head = tl.multiple_of(stride_value_row_head, 8)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    kv_heads = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    dims = tl.arange(0, DIMS)
    present = (kv_heads < NUM_KV_HEADS)[:, None] & (dims < HEAD_SIZE)[None, :]
    _store(
        key + token * stride_key_row, key_scale,
        key_cache + block * stride_key_block + place * stride_key_token,
        kv_heads, dims, present, stride_key_row_head, stride_key_head, LARGEST,
    )  # fmt: skip
    _store(
        value + token * stride_value_row, value_scale,
        value_cache + block * stride_value_block + place * stride_value_token,
        kv_heads, dims, present, stride_value_row_head, stride_value_head, LARGEST,
    )  # fmt: skip
