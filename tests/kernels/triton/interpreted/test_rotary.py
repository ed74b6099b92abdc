"""The fused rotation of queries and keys, against the same in float64."""

import math

import pytest
import torch

from tests.kernels.batches import TABLE_ERROR, make_rotary, turn
from tests.test_rope import POSITIONS, THETAS, exact_angle
from vllm_lminf.kernels.triton.rotary import rotary_embedding
from vllm_lminf.rope import RotarySpec, RotationTables

SHAPES = {
    "grouped": (9, 3, 64, 64),
    "many heads": (71, 1, 64, 64),
    "partial": (4, 2, 80, 32),
    "partial, no power of two": (3, 1, 96, 72),
    "wide": (2, 2, 256, 256),
    "narrow": (4, 4, 16, 8),
    "one head": (1, 1, 112, 112),
}
"""Query heads, key heads, dimensions of a head, those that are rotated."""

pairs = pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "gptj"])


def run(
    spec: RotarySpec, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    tables, head_size = RotationTables(spec.inv_freq).tables, query.shape[-1]
    arguments = tables, head_size, spec.is_neox_style, spec.magnitude
    turned = rotary_embedding(positions, query, key, *arguments)
    by_operator = torch.ops.lminf.rotary_embedding(positions, query, key, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(turned, by_operator, strict=True))
    return turned


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_heads(name: str, dtype: torch.dtype, is_neox_style: bool) -> None:
    """Every head, in every dtype: the exact rotation, rounded once. The magnitude is that of the
    rotated dimensions alone."""
    num_heads, num_kv_heads, head_size, rotary_dim = SHAPES[name]
    spec = make_rotary(rotary_dim, is_neox_style, magnitude=1.25)
    positions = torch.tensor([0, 5, 1023, 123_456_789, 2**31 - 1])
    query = torch.randn(5, num_heads, head_size).to(dtype)
    key = torch.randn(5, num_kv_heads, head_size).to(dtype)
    index_dtype = torch.int32 if dtype == torch.float16 else torch.int64
    turned = run(spec, positions.to(index_dtype), query, key)
    for x, result in zip((query, key), turned, strict=True):
        expected = turn(x.double(), positions, spec)
        assert result.shape == x.shape
        assert result.dtype == dtype
        # Half a digit of a number up to 8, and what the tables lose of a vector's length.
        rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 4e-7
        torch.testing.assert_close(result.double(), expected, rtol=rounding, atol=16 * TABLE_ERROR)
        assert torch.equal(result[..., rotary_dim:], x[..., rotary_dim:])


@pairs
@pytest.mark.parametrize("theta", THETAS)
def test_phase_is_exact(theta: float, is_neox_style: bool) -> None:
    """Unit vectors come out as cosines and sines, by angles of an exact product."""
    spec = make_rotary(64, is_neox_style, theta=theta)
    positions = [position for some in POSITIONS.values() for position in some[:8]]
    unit = torch.zeros(len(positions), 1, 64)
    unit[..., slice(0, 32) if is_neox_style else slice(0, None, 2)] = 1.0
    (turned, nothing) = run(spec, torch.tensor(positions), unit, None)
    assert nothing.numel() == 0
    cos, sin = turned.chunk(2, -1) if is_neox_style else (turned[..., ::2], turned[..., 1::2])
    cos, sin = cos[:, 0].double(), sin[:, 0].double()
    expected = torch.tensor(
        [[exact_angle(p, f) for f in spec.inv_freq.tolist()] for p in positions],
        dtype=torch.float64,
    )
    error = torch.atan2(
        sin * expected.cos() - cos * expected.sin(), cos * expected.cos() + sin * expected.sin()
    )
    assert error.abs().max() < 1e-6


@pairs
def test_slices_and_flat_heads(is_neox_style: bool) -> None:
    """As a projection's parts lie: beside each other, heads not a dimension of their own."""
    spec = make_rotary(32, is_neox_style)
    positions = torch.tensor([7, 10**6, 3])
    tables, arguments = RotationTables(spec.inv_freq).tables, (32, is_neox_style, 1.0)
    qkv = torch.randn(3, 8 * 32)
    query, key, _ = qkv.split([4 * 32, 2 * 32, 2 * 32], dim=-1)
    before = qkv.clone()
    turned_query, turned_key = rotary_embedding(positions, query, key, tables, *arguments)
    assert torch.equal(qkv, before), "out of place"
    assert turned_query.shape == query.shape
    assert turned_query.is_contiguous()
    assert turned_key.is_contiguous()
    for x, turned in ((query, turned_query), (key, turned_key)):
        heads = x.reshape(3, -1, 32).contiguous()
        expected, _ = rotary_embedding(positions, heads, None, tables, *arguments)
        assert torch.equal(turned.view_as(expected), expected)
    # A memory order in which a head's dimensions lie apart.
    apart = torch.randn(3, 32, 4).transpose(1, 2)
    turned, _ = rotary_embedding(positions, apart, None, tables, *arguments)
    expected, _ = rotary_embedding(positions, apart.contiguous(), None, tables, *arguments)
    assert torch.equal(turned, expected)


def test_positions_of_padding_read_the_tables_only() -> None:
    """Rows that belong to nobody may hold any position. Read outside of the tables, a row would be
    NaN here."""
    spec = make_rotary(16)
    storage = torch.full((3 * 4096, 8, 2), math.nan)
    tables = storage[4096:8192]
    tables.copy_(RotationTables(spec.inv_freq).tables)
    positions = torch.tensor([-1, -(2**31), 2**31, 2**40 + 3, -(2**40), 2**62])
    turned, _ = rotary_embedding(positions, torch.randn(6, 2, 16), None, tables, 16, True, 1.0)
    assert turned.isfinite().all()


def test_no_tokens() -> None:
    tables = RotationTables(make_rotary(16).inv_freq).tables
    query, key = torch.empty(0, 4 * 16), torch.empty(0, 2 * 16)
    turned = rotary_embedding(torch.empty(0, dtype=torch.int64), query, key, tables, 16, True, 1.0)
    assert [x.shape for x in turned] == [query.shape, key.shape]


def test_the_operator_keeps_torchs_rules() -> None:
    """What a compiler is told of its results is so, and it writes to nothing it is given."""
    tables = RotationTables(make_rotary(16).inv_freq).tables
    positions = torch.arange(3)
    query, key = torch.randn(3, 4 * 16), torch.randn(3, 6 * 16)[:, 16:48]
    for arguments in ((query, key), (query, None)):
        torch.library.opcheck(
            torch.ops.lminf.rotary_embedding, (positions, *arguments, tables, 16, True, 1.0)
        )
