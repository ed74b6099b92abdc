"""Rotations: exact at any position, in bounded memory, in the layouts that models use."""

import math
import random
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotate
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotate
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

from tests.kernels.batches import TABLE_ERROR, make_rotary, turn
from vllm_lminf.pattern import MAX_POSITION
from vllm_lminf.rope import RotarySpec, RotationTables, rotate

TWO_PI = Fraction(Decimal("6.2831853071795864769252867665590057683943387987502116419498892"))

POSITIONS = {
    "0": [0, 1, 2],
    "2**10": [1022, 1023, 1024, 1025],
    "2**20": [2**20 - 1, 2**20, 2**20 + 1, 2**20 + 2**10 - 1],
    "1e6": [999_999, 1_000_000, 1_000_001],
    "1e8": [99_999_999, 100_000_000, 100_000_001],
    "2**31": [2**31 - 2**20, 2**31 - 2**10, 2**31 - 2, MAX_POSITION],
    "random": random.Random(0).sample(range(2**31), 64),
}
THETAS = [1e4, 1e5, 5e5, 1e7]


def exact_angle(position: int, inv_freq: float) -> float:
    """``position * inv_freq`` in [0, 2 pi): an exact product, reduced in exact arithmetic."""
    return float(Fraction(position) * Fraction(inv_freq) % TWO_PI)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("name", POSITIONS)
def test_phase_is_exact(name: str, theta: float) -> None:
    spec = make_rotary(64, theta=theta)
    positions = POSITIONS[name]
    cos, sin = RotationTables(spec.inv_freq)(torch.tensor(positions))
    assert cos.shape == sin.shape == (len(positions), 32)
    assert cos.dtype == sin.dtype == torch.float32
    expected = torch.tensor(
        [[exact_angle(p, f) for f in spec.inv_freq.tolist()] for p in positions],
        dtype=torch.float64,
    )
    cos, sin = cos.double(), sin.double()
    error = torch.atan2(
        sin * expected.cos() - cos * expected.sin(), cos * expected.cos() + sin * expected.sin()
    )
    assert error.abs().max() < 1e-6
    assert (cos.square() + sin.square() - 1).abs().max() < 2 * 1e-6


def test_float32_angles_would_fail_here() -> None:
    """What the tables are for: one product in float32 is off by orders of magnitude more."""
    inv_freq = make_rotary(64).inv_freq
    angle = (torch.tensor(1_000_003.0) * inv_freq.float()).double()
    exact = [math.cos(exact_angle(1_000_003, f)) for f in inv_freq.tolist()]
    assert (angle.cos() - torch.tensor(exact, dtype=torch.float64)).abs().max() > 1e-3


def test_error_bound_of_the_tables() -> None:
    """The bound that the kernels' tolerances rest on, at positions that a float64 product
    reaches without a loss of its own."""
    inv_freq = make_rotary(128).inv_freq
    positions = torch.tensor(random.Random(1).sample(range(2**20), 4096))
    cos, sin = RotationTables(inv_freq)(positions)
    angles = positions.double()[:, None] * inv_freq
    error = torch.hypot(cos.double() - angles.cos(), sin.double() - angles.sin())
    assert TABLE_ERROR / 20 < error.max() <= TABLE_ERROR


@pytest.mark.parametrize(("rotary_dim", "megabytes"), [(16, 0.25), (64, 1), (128, 2), (256, 4)])
def test_tables_are_small(rotary_dim: int, megabytes: float) -> None:
    tables = RotationTables(make_rotary(rotary_dim).inv_freq)
    tables(torch.tensor([MAX_POSITION]))
    size = sum(t.numel() * t.element_size() for t in (*tables.buffers(), *tables.parameters()))
    assert size <= megabytes * 2**20


def test_tables_are_not_part_of_a_checkpoint() -> None:
    assert not RotationTables(make_rotary(64).inv_freq).state_dict()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_may_be_32_or_64_bit(dtype: torch.dtype) -> None:
    tables = RotationTables(make_rotary(32).inv_freq)
    positions = torch.tensor([0, 1023, 1024, 2**20, MAX_POSITION])
    torch.testing.assert_close(tables(positions.to(dtype)), tables(positions), rtol=0, atol=0)


def test_position_past_the_end_is_an_error() -> None:
    tables = RotationTables(make_rotary(32).inv_freq)
    with pytest.raises(IndexError):
        tables(torch.tensor([MAX_POSITION + 1]))


def test_frequencies_of_any_dtype_are_read_in_float64() -> None:
    inv_freq = make_rotary(32).inv_freq.float()
    positions = torch.tensor([2**30 + 12345])
    torch.testing.assert_close(
        RotationTables(inv_freq)(positions),
        RotationTables(inv_freq.double())(positions),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize(("head_size", "rotary_dim"), [(64, 64), (80, 32), (96, 96), (256, 64)])
def test_rotate_by_complex_numbers(head_size: int, rotary_dim: int, is_neox_style: bool) -> None:
    spec = make_rotary(rotary_dim, is_neox_style)
    assert spec.rotary_dim == rotary_dim
    x = torch.randn(7, 3, head_size, dtype=torch.float64)
    positions = torch.arange(100, 107)
    angles = positions.double()[:, None] * spec.inv_freq
    turned = rotate(x, angles.cos(), angles.sin(), is_neox_style)
    assert turned.shape == x.shape
    assert turned.dtype == x.dtype
    torch.testing.assert_close(turned, turn(x, positions, spec), rtol=0, atol=1e-12)
    assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])
    back = rotate(turned, angles.cos(), -angles.sin(), is_neox_style)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


def test_rotations_add_up() -> None:
    spec = make_rotary(64)
    tables = RotationTables(spec.inv_freq)
    x = torch.randn(5, 2, 64, dtype=torch.float64)
    first, second = torch.arange(5) * 1_000_003, torch.arange(5) * 777
    twice = rotate(rotate(x, *tables(first), True), *tables(second), True)
    once = rotate(x, *tables(first + second), True)
    torch.testing.assert_close(twice, once, rtol=0, atol=3 * TABLE_ERROR * x.norm(dim=-1).max())


@pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "gptj"])
def test_rotate_pairs_as_vllm_does(is_neox_style: bool) -> None:
    spec = make_rotary(64, is_neox_style)
    x = torch.randn(9, 4, 64)
    cos, sin = RotationTables(spec.inv_freq)(torch.arange(9) * 100)
    expected = ApplyRotaryEmb.forward_static(x, cos, sin, is_neox_style)
    torch.testing.assert_close(rotate(x, cos, sin, is_neox_style), expected, rtol=0, atol=1e-6)


def test_rotate_pairs_as_transformers_does_for_llama() -> None:
    x = torch.randn(9, 4, 64)
    cos, sin = RotationTables(make_rotary(64).inv_freq)(torch.arange(9) * 100)
    heads_first = x.transpose(0, 1)[None]
    wide = (torch.cat((cos, cos), dim=-1)[None], torch.cat((sin, sin), dim=-1)[None])
    expected, _ = llama_rotate(heads_first, heads_first, *wide)
    turned = rotate(x, cos, sin, is_neox_style=True)
    torch.testing.assert_close(turned, expected[0].transpose(0, 1), rtol=0, atol=1e-6)


def test_rotate_pairs_as_transformers_does_for_gptj() -> None:
    x = torch.randn(9, 4, 64)
    cos, sin = RotationTables(make_rotary(64).inv_freq)(torch.arange(9) * 100)
    expected = gptj_rotate(x[None], sin[None], cos[None])[0]
    turned = rotate(x, cos, sin, is_neox_style=False)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rotate_keeps_the_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 32).to(dtype)
    cos, sin = RotationTables(make_rotary(32).inv_freq)(torch.arange(5) * 1000)
    turned = rotate(x, cos, sin, is_neox_style=True)
    assert turned.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(turned, rotate(x.to(wide), cos.to(wide), sin.to(wide), True).to(dtype))


def test_rotate_leaves_its_input_alone() -> None:
    x = torch.randn(5, 2, 32)
    before = x.clone()
    rotate(x, torch.zeros(5, 8), torch.ones(5, 8), is_neox_style=True)
    assert torch.equal(x, before)


def test_quarter_turn() -> None:
    """(1, 0) turned by 90 degrees is (0, 1): the sense of rotation is RoPE's."""
    spec = RotarySpec(torch.tensor([math.pi / 2], dtype=torch.float64), is_neox_style=True)
    cos, sin = RotationTables(spec.inv_freq)(torch.tensor([1]))
    turned = rotate(torch.tensor([[[1.0, 0.0]]]), cos, sin, is_neox_style=True)
    torch.testing.assert_close(turned, torch.tensor([[[0.0, 1.0]]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "gptj"])
def test_traces_without_a_graph_break(is_neox_style: bool) -> None:
    tables = RotationTables(make_rotary(32).inv_freq)

    def turned(positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cos, sin = tables(positions)
        return rotate(x, cos, sin, is_neox_style)

    compiled = torch.compile(turned, backend="eager", fullgraph=True, dynamic=True)
    for count in (1, 5, 9):
        positions, x = torch.arange(count) * 10**8, torch.randn(count, 2, 40)
        torch.testing.assert_close(compiled(positions, x), turned(positions, x), rtol=0, atol=0)
