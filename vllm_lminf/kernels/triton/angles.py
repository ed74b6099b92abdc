"""Rotations inside a kernel: exact angles of any position, and their inverse applied to tiles.

An entry of the tables is a unit complex number, its cosine and sine read as one int64; see
`vllm_lminf.rope.RotationTables` for the three digits of a position. Rows of a tile stand at
consecutive positions, so a row's angle is that of the tile's first position, which all rows share,
times that of a small offset, which is one row of the first table.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def _unit(angles, rows, pair, mask, HALF: tl.constexpr):
    """Cosines and sines of ``pair`` in these rows of the tables; 1 and 0 outside the mask."""
    packed = tl.load(angles + rows * HALF + pair, mask=mask, other=0x3F800000)
    cos = packed.to(tl.int32).to(tl.float32, bitcast=True)
    sin = (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return cos, sin


@triton.jit
def _product(cos, sin, cos_too, sin_too):
    """Adds angles: the product of unit vectors, read as complex numbers."""
    return cos * cos_too - sin * sin_too, sin * cos_too + cos * sin_too


@triton.jit
def angles_of(
    angles,
    first,
    offsets,
    dims,
    HALF: tl.constexpr,
    IS_NEOX: tl.constexpr,
):
    """Cosines and sines [rows, dims] of the positions ``first + offsets``.

    Args:
        angles: int64 [4096, HALF], the tables.
        first: int32, a position; 0 to 2**31 - 1.
        offsets: int32 [rows], each below 1024.
        dims: int32 [dims]: dimensions of a head; those past the rotary ones get 1 and 0.
    """
    pair = dims % HALF if IS_NEOX else dims // 2
    rotary = dims < 2 * HALF
    low_cos, low_sin = _unit(angles, first & 1023, pair, rotary, HALF)
    middle_cos, middle_sin = _unit(angles, 1024 + ((first >> 10) & 1023), pair, rotary, HALF)
    high_cos, high_sin = _unit(angles, 2048 + (first >> 20), pair, rotary, HALF)
    cos, sin = _product(low_cos, low_sin, middle_cos, middle_sin)
    cos, sin = _product(cos, sin, high_cos, high_sin)
    row_cos, row_sin = _unit(angles, offsets[:, None], pair[None, :], rotary[None, :], HALF)
    return _product(row_cos, row_sin, cos[None, :], sin[None, :])


@triton.jit
def partners(dims, HALF: tl.constexpr, IS_NEOX: tl.constexpr):
    """The other dimension of the pair that each one belongs to.

    Dimensions past the rotary ones get any dimension: their sine is 0.
    """
    return (dims + HALF) % (2 * HALF) if IS_NEOX else dims ^ 1


@triton.jit
def inverse_rotation(x, partner, cos, sin, dims, HALF: tl.constexpr, IS_NEOX: tl.constexpr):
    """A tile [rows, dims] rotated by the negative of its angles, in float32.

    Args:
        x: the tile.
        partner: the same with the two dimensions of every pair exchanged, see `partners`.
    """
    is_first = dims < HALF if IS_NEOX else dims % 2 == 0
    signed = tl.where(is_first[None, :], sin, -sin)
    return x.to(tl.float32) * cos + partner.to(tl.float32) * signed
