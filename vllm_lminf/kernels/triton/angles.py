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
def angles_at(angles, position, pairs, HALF: tl.constexpr):
    """Cosines and sines [pairs] of one position; see `angles_of`."""
    rotary = pairs < HALF
    low_cos, low_sin = _unit(angles, position & 1023, pairs, rotary, HALF)
    middle_cos, middle_sin = _unit(angles, 1024 + ((position >> 10) & 1023), pairs, rotary, HALF)
    high_cos, high_sin = _unit(angles, 2048 + (position >> 20), pairs, rotary, HALF)
    cos, sin = _product(low_cos, low_sin, middle_cos, middle_sin)
    return _product(cos, sin, high_cos, high_sin)


@triton.jit
def angles_of(
    angles,
    first,
    offsets,
    pairs,
    HALF: tl.constexpr,
):
    """Cosines and sines [rows, pairs] of the positions ``first + offsets``.

    Args:
        angles: int64 [4096, HALF], the tables.
        first: int32, a position; 0 to 2**31 - 1.
        offsets: int32 [rows], each below 1024.
        pairs: int32 [pairs]: those past the rotary ones get 1 and 0.
    """
    cos, sin = angles_at(angles, first, pairs, HALF)
    row_cos, row_sin = small_angles_of(angles, offsets, pairs, HALF)
    return _product(row_cos, row_sin, cos[None, :], sin[None, :])


@triton.jit
def small_angles_of(angles, positions, pairs, HALF: tl.constexpr):
    """Cosines and sines [rows, pairs] of positions below 1024; see `angles_of`."""
    return _unit(angles, positions[:, None], pairs[None, :], (pairs < HALF)[None, :], HALF)


@triton.jit
def dims_of(pairs, HALF: tl.constexpr, IS_NEOX: tl.constexpr, IS_WHOLE: tl.constexpr):
    """The two dimensions of every pair, int32 [pairs] each.

    Args:
        pairs: those past the rotary ones are neighbours; past the head, so are their dimensions.
        IS_WHOLE: all pairs are rotary ones.
    """
    first, second = 2 * pairs, 2 * pairs + 1
    if IS_NEOX and IS_WHOLE:
        first, second = pairs, pairs + HALF
    elif IS_NEOX:
        first = tl.where(pairs < HALF, pairs, first)
        second = tl.where(pairs < HALF, pairs + HALF, second)
    return first, second


@triton.jit
def partners_of(dims, HALF: tl.constexpr, IS_NEOX: tl.constexpr):
    """For heads that are turned dimension by dimension, in their own order: of every dimension the
    pair, for `angles_of`; the partner in it, itself where it isn't rotated; and the sign of the
    partner's share in `inverse_rotation`."""
    if IS_NEOX:
        is_first = dims < HALF
        pairs = tl.where(is_first, dims, dims - HALF)
        partners = tl.where(is_first, dims + HALF, dims - HALF)
    else:
        is_first = dims % 2 == 0
        pairs = dims // 2
        partners = dims ^ 1
    is_rotary = dims < 2 * HALF
    return (
        tl.where(is_rotary, pairs, HALF),
        tl.where(is_rotary, partners, dims),
        tl.where(is_first, 1.0, -1.0),
    )


@triton.jit
def inverse_rotation(first, second, cos, sin):
    """Both dimensions of pairs rotated by the negative of their angles, in float32."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    return first * cos + second * sin, second * cos - first * sin
