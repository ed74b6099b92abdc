"""Rotary position embedding that is exact at any position below 2**31, in 1 to 4 MB.

A rotation by position ``p`` rotates the pair ``k`` of rotary dimensions by ``p * inv_freq[k]``
radians (arXiv 2104.09864). One float32 table with a row for every position grows without end, and
a float32 product loses digits (0.06 rad at p = 1e6). Here ``p`` is written in three digits,
``p = a * 2**20 + b * 2**10 + c``; each digit has a small table of cosines and sines, computed in
float64, and the angle-addition rule joins them. What remains is the rounding of float32 cosines.
"""

from dataclasses import dataclass

import torch

_LOW_BITS = 10
_HIGH_BITS = 11


@dataclass(frozen=True)
class RotarySpec:
    """What a rotation needs to know, whichever model it came from.

    Attributes:
        inv_freq: radians per position of every rotated pair; float64 of shape [rotary_dim / 2].
        is_neox_style: pairs are (k, k + rotary_dim / 2) when true (NeoX, LLaMA), (2k, 2k + 1)
            otherwise (GPT-J).
        magnitude: factor on every rotated vector (YaRN's mscale); 1.0 for a pure rotation.
    """

    inv_freq: torch.Tensor
    is_neox_style: bool
    magnitude: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of a head are rotated; the others pass unchanged."""
        return 2 * self.inv_freq.numel()


class RotationTables(torch.nn.Module):
    """Cosines and sines of ``position * inv_freq`` for any position in [0, 2**31).

    The phase error stays below 1e-6 rad at every position. The forward is made of gathers and
    products alone: it traces under ``torch.compile`` and is legal in a CUDA graph.
    """

    tables: torch.Tensor
    """float32 of shape [rows, rotary_dim / 2, 2]: unit vectors (cosine, sine), the three digits'
    rows one after the other."""

    def __init__(self, inv_freq: torch.Tensor, device: torch.device | None = None) -> None:
        super().__init__()
        inv_freq = inv_freq.to("cpu", torch.float64)
        digits = torch.cat(
            [
                torch.arange(2**_LOW_BITS, device="cpu"),
                torch.arange(2**_LOW_BITS, device="cpu") << _LOW_BITS,
                torch.arange(2**_HIGH_BITS, device="cpu") << (2 * _LOW_BITS),
            ]
        )
        angles = digits.to(torch.float64)[:, None] * inv_freq
        tables = torch.stack((angles.cos(), angles.sin()), -1).to(device or "cpu", torch.float32)
        self.register_buffer("tables", tables, persistent=False)
        self._leading: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines at ``positions``.

        Args:
            positions: integers of shape [num_tokens], each in [0, 2**31).

        Returns:
            Two float32 tensors of shape [num_tokens, rotary_dim / 2], views of one.
        """
        tracing = torch.compiler.is_compiling()
        look_up = torch.ops.lminf.rotary_angles if tracing else _look_up_angles
        angles = look_up(positions, self.tables)
        return angles[0], angles[1]

    def leading(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same at the positions 0 to ``count - 1``. What was computed is kept, and as it grows
        with ``count``, doubles."""
        if self._leading is None or len(self._leading[0]) < count:
            size = 1 << (count - 1).bit_length() if count > 0 else 0
            self._leading = self(torch.arange(size, device=self.tables.device))
        cos, sin = self._leading
        return cos[:count], sin[:count]


def _look_up_angles(positions: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Cosines and sines, [2, num_tokens, rotary_dim / 2]; see `RotationTables`.

    A product of unit vectors, read as complex numbers, adds their angles.
    """
    vectors, mask = torch.view_as_complex(tables), 2**_LOW_BITS - 1
    low = vectors[positions & mask]
    middle = vectors[((positions >> _LOW_BITS) & mask) + 2**_LOW_BITS]
    high = vectors[(positions >> (2 * _LOW_BITS)) + 2 * 2**_LOW_BITS]
    return torch.view_as_real(low * middle * high).permute(2, 0, 1).contiguous()


@torch.library.custom_op("lminf::rotary_angles", mutates_args=())
def _rotary_angles(positions: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """`_look_up_angles` for compiled models: an operator of its own, so that a compiler computes it
    once for all layers instead of copying it into the kernels of every layer, which multiplies its
    compile time."""
    return _look_up_angles(positions, tables)


@_rotary_angles.register_fake
def _(positions: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    return tables.new_empty((2, positions.shape[0], tables.shape[1]))


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool
) -> torch.Tensor:
    """Rotates the leading rotary dimensions of every head by the given angles.

    Args:
        x: shape [..., num_heads, head_size].
        cos: cosines, shape [..., rotary_dim / 2]: one angle for all heads of a token.
        sin: sines, same shape. Pass ``-sin`` to rotate back.
        is_neox_style: how pairs are laid out, see `RotarySpec`.

    Returns:
        A new tensor of x's shape and dtype; products are formed in the wider of the two dtypes.
    """
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if is_neox_style:
        first, second = rotated.chunk(2, dim=-1)
    else:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    halves = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.cat(halves, dim=-1) if is_neox_style else torch.stack(halves, -1).flatten(-2)
    return torch.cat((joined.to(x.dtype), rest), dim=-1)
