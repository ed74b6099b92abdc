"""Writes the archive: keys without their rotation, values, and the index of every full page.

Codes lie as the keys do, [H, B, D], whatever a page's other parts: `ArchiveFormat`.

What the numbers of the index promise. With the centre ``m``, the codes ``c`` and the scale ``s`` of
a key, and the query ``q`` as `search.scan_kernel` takes it to tensor cores, ``t`` times the float16
numbers ``a``::

    k = m + s c + r                     r is what is left
    q = t a + e                         |e| <= 2**-11 * 1.01 |q|
    q . k = q . m + s t (a . c) + s e . c + q . r

The estimate is the first two terms. By Cauchy and Schwarz the others are ``|q| (|r| + 0.0005 s
|c|)`` at most. The rest is rounding, with ``u = 2**-24``, ``D`` dimensions and ``z = |m| + s |c| +
|r|``, which is no less than ``|k|``; a sum of D products in float32, in any order, is off by ``1.01
D u`` of the sum of their sizes (Higham, Accuracy and Stability of Numerical Algorithms, section
3.1):

- ``q . m`` and the score itself: ``2.02 D u |q| z``.
- ``a . c``: its products are exact in float32, and so are tensor cores' but for how they add, which
  isn't IEEE's: they cut off what is far below the largest (Fasi and others, Numerical behavior of
  NVIDIA tensor cores, 2021). ``2**-21`` of the sum of sizes for each addition is eight times what
  they were seen to lose: ``D 2**-21 s |c| |q|``.
- ``|r|`` is measured in float32: elements by ``3 u z``, the norm by ``(D / 2 + 2) u``.
- Queries are turned here and there, and a few operations join the terms: less than ``30 u |q| z``,
  and a few ``u`` of the bound itself.

Together: ``|score - estimate| <= |q| radius + 2**-100`` with

    radius = |r| + (0.0005 + D 2**-21) s |c| + (3 D + 64) u z + 2**-56

The small numbers are more than what squares and products below float32's smallest numbers lose,
even where such are flushed to zero: ``s`` is 2**-60 at least, or 0, and a query's largest element
2**-48, or its keys are all scored exactly. A key of more than 2**58, or one that isn't finite, has
an infinite radius.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from vllm_lminf.kernels.triton.angles import angles_at, partners_of
from vllm_lminf.kernels.triton.tiles import request_of_row

LARGEST_CODE = tl.constexpr(127.0)
SMALLEST_SCALE = tl.constexpr(2.0**-60)
LARGEST_KEY = tl.constexpr(2.0**58)
QUERY_ROUNDING = tl.constexpr(0.0005)
SMALLEST_RADIUS = tl.constexpr(2.0**-56)


@triton.jit
def keys_of(archive, page, kv_head, stride_page, dtype,
            HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Where pages have a head's keys, [B, D] of ``dtype``."""
    start = archive + page.to(tl.int64) * stride_page
    return start.to(tl.pointer_type(dtype)) + kv_head * (BLOCK_SIZE * HEAD_SIZE)


@triton.jit
def values_of(archive, page, kv_head, stride_page, dtype,
              HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Where pages have a head's values, [B, D] of ``dtype``."""
    keys = keys_of(archive, page, kv_head, stride_page, dtype, HEADS, HEAD_SIZE, BLOCK_SIZE)
    return keys + HEADS * BLOCK_SIZE * HEAD_SIZE


@triton.jit
def index_of(archive, page, kv_head, stride_page, dtype,
             HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Where a page has a head's codes int8 [B, D], scales and radii [B], and centre [D]."""
    KEYS: tl.constexpr = HEADS * BLOCK_SIZE
    KEPT: tl.constexpr = KEYS * HEAD_SIZE * dtype.primitive_bitwidth // 8
    start = archive + page.to(tl.int64) * stride_page + 2 * KEPT
    codes = start.to(tl.pointer_type(tl.int8)) + kv_head * (BLOCK_SIZE * HEAD_SIZE)
    scales = (start + KEYS * HEAD_SIZE).to(tl.pointer_type(tl.float32))
    return (
        codes,
        scales + kv_head * BLOCK_SIZE,
        scales + KEYS + kv_head * BLOCK_SIZE,
        scales + 2 * KEYS + kv_head * HEAD_SIZE,
    )


@triton.jit(
    do_not_specialize=[
        "num_requests", "stride_key_row", "stride_key_row_head", "stride_value_row",
        "stride_value_row_head",
    ],
    do_not_specialize_on_alignment=["slot_mapping", "query_start_loc", "seq_lens"],
)  # fmt: skip
def keep_kernel(
    key, value, archive, slot_mapping, query_start_loc, seq_lens, angles, num_requests,
    stride_key_row, stride_key_row_head, stride_value_row, stride_value_row_head, stride_page,
    NUM_KV_HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr, HALF: tl.constexpr, IS_NEOX: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One token's keys and values; grid (tokens, groups of TILE_HEADS heads).

    Args:
        key: rotated; rows of the batch, [tokens, heads, HEAD_SIZE]; strides are multiples of 8.
        value: the same.
        slot_mapping: [tokens]; negative for a token that isn't kept.
        angles: see `angles`; None where nothing is rotated.
    """
    # Rows move 16 bytes at a time: of an argument the compiler forgets what `multiple_of` says.
    stride_key_row = stride_key_row // 8 * 8
    stride_key_row_head = stride_key_row_head // 8 * 8
    stride_value_row = stride_value_row // 8 * 8
    stride_value_row_head = stride_value_row_head // 8 * 8
    token = tl.program_id(0)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    request = request_of_row(query_start_loc, num_requests, token)
    end = tl.load(query_start_loc + request + 1)
    if token >= end:
        return
    position = tl.load(seq_lens + request) - end + token
    page, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    kv_heads = (tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS))[:, None]
    dims = tl.arange(0, DIMS)
    present = (kv_heads < NUM_KV_HEADS) & (dims < HEAD_SIZE)[None, :]
    row = place * HEAD_SIZE + dims[None, :]

    keys = key + token.to(tl.int64) * stride_key_row + kv_heads * stride_key_row_head
    k = tl.load(keys + dims[None, :], mask=present, other=0.0)
    if angles is not None:
        pairs, partners, sign = partners_of(dims, HALF, IS_NEOX)
        cos, sin = angles_at(angles, position, pairs, HALF)
        other = tl.load(keys + partners[None, :], mask=present, other=0.0).to(tl.float32)
        turned = k.to(tl.float32) * cos[None, :] + other * (sign * sin)[None, :]
        k = tl.where((dims < 2 * HALF)[None, :], turned.to(k.dtype), k)
    kept = keys_of(archive, page, kv_heads, stride_page, k.dtype,
                   NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE)  # fmt: skip
    tl.store(kept + row, k, mask=present)

    values = value + token.to(tl.int64) * stride_value_row + kv_heads * stride_value_row_head
    v = tl.load(values + dims[None, :], mask=present, other=0.0)
    kept = values_of(archive, page, kv_heads, stride_page, v.dtype,
                     NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE)  # fmt: skip
    tl.store(kept + row, v, mask=present)


@triton.jit
def _centred(keys, centre, start, dims, HEAD_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Some keys of a page, less the centre; float32 [TILE, dims]."""
    rows = start + tl.arange(0, TILE)
    there = (dims < HEAD_SIZE)[None, :]
    k = tl.load(keys + rows[:, None] * HEAD_SIZE + dims[None, :], mask=there, other=0.0)
    return k.to(tl.float32) - centre[None, :]


@triton.jit
def _length(x):
    """Of every row [rows, dims]."""
    return tl.sqrt(tl.sum(x * x, axis=1))


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def index_kernel(
    key, archive, slot_mapping, stride_page,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Indexes one head of the page that a token fills, if it does; grid (tokens, heads). Behind
    `keep_kernel`.

    Args:
        key: of which the dtype alone is asked.
        slot_mapping: [tokens]; negative for a token that isn't kept.
        TILE: keys at once; divides BLOCK_SIZE.
    """
    slot = tl.load(slot_mapping + tl.program_id(0)).to(tl.int64)
    if slot < 0 or slot % BLOCK_SIZE != BLOCK_SIZE - 1:
        return
    page, kv_head = slot // BLOCK_SIZE, tl.program_id(1)
    dtype: tl.constexpr = key.dtype.element_ty
    keys = keys_of(archive, page, kv_head, stride_page, dtype, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE)
    codes, scales, radii, centres = index_of(
        archive, page, kv_head, stride_page, dtype, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE
    )
    dims = tl.arange(0, DIMS)
    there = dims < HEAD_SIZE
    nothing = tl.zeros((DIMS,), tl.float32)
    total = nothing
    for start in range(0, BLOCK_SIZE, TILE):
        total += tl.sum(_centred(keys, nothing, start, dims, HEAD_SIZE, TILE), axis=0)
    centre = total / BLOCK_SIZE
    tl.store(centres + dims, centre, mask=there)
    centre_length = tl.sqrt(tl.sum(centre * centre, axis=0))
    for start in range(0, BLOCK_SIZE, TILE):
        rest = _centred(keys, centre, start, dims, HEAD_SIZE, TILE)
        # Not so for NaN.
        is_known = centre_length + _length(rest) <= LARGEST_KEY
        scale = tl.max(tl.abs(rest), axis=1) / LARGEST_CODE
        scale = tl.where(is_known & (scale >= SMALLEST_SCALE), scale, 0.0)
        inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
        code = tl.floor(rest * inverse[:, None] + 0.5)
        code = tl.where(is_known[:, None], code, 0.0)
        code = tl.minimum(tl.maximum(code, -LARGEST_CODE), LARGEST_CODE)
        left = _length(rest - code * scale[:, None])
        coded = scale * _length(code)
        sizes = centre_length + coded + left
        radius = left + coded * (QUERY_ROUNDING + HEAD_SIZE * 2.0**-21)
        radius += sizes * ((3 * HEAD_SIZE + 64) * 2.0**-24) + SMALLEST_RADIUS
        rows = start + tl.arange(0, TILE)
        where = codes + rows[:, None] * HEAD_SIZE + dims[None, :]
        tl.store(where, code.to(tl.int8), mask=there[None, :])
        tl.store(scales + rows, scale)
        tl.store(radii + rows, tl.where(is_known, radius, float("inf")))
