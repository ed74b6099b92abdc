"""The oracle against the definition it claims to compute, pair by pair in float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.batches import lambda_distance, literal_attention, make_rotary, turn
from tests.policies import WithMiddle
from vllm_lminf.kernels.oracle import lambda_attention
from vllm_lminf.pattern import LambdaPattern, Pattern
from vllm_lminf.rope import RotarySpec

EXACT = 1e-11
"""Both sides compute in float64; angles reach some 100 rad, so phases are good to 1e-14."""

# n_global, n_local, distance_limit
PATTERNS = [
    (0, 1, 1),
    (0, 7, 7),
    (1, 7, 7),
    (4, 7, 7),
    (4, 7, 12),
    (11, 5, 5),
    (11, 5, 6),
    (40, 3, 3),
    (2, 40, 40),
    (2, 7, 40),
]


def draw(
    num_queries: int, num_keys: int, heads: tuple[int, int] = (4, 2), head_size: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_queries * 1000 + num_keys)
    shapes = [(num_queries, heads[0]), (num_keys, heads[1]), (num_keys, heads[1])]
    query, key, value = (
        torch.randn(*shape, head_size, dtype=torch.float64, generator=generator) for shape in shapes
    )
    return query, key, value


def assert_is_literal(
    pattern: Pattern,
    num_keys: int = 30,
    query_start: int = 0,
    heads: tuple[int, int] = (4, 2),
    rotary: RotarySpec | None = None,
    alibi_slopes: torch.Tensor | None = None,
    distance_of: Callable[[int, int], int | None] | None = None,
) -> None:
    query, key, value = draw(num_keys - query_start, num_keys, heads)
    extras = {"scale": 0.3, "rotary": rotary, "alibi_slopes": alibi_slopes}
    output = lambda_attention(query, key, value, pattern, query_start=query_start, **extras)
    expected = literal_attention(
        query,
        list(range(query_start, num_keys)),
        key,
        value,
        list(range(num_keys)),
        distance_of or partial(lambda_distance, pattern),
        **extras,
    )
    assert output.shape == query.shape
    assert output.dtype == query.dtype
    assert output.isfinite().all()
    torch.testing.assert_close(output, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rope(pattern: tuple[int, int, int]) -> None:
    assert_is_literal(LambdaPattern(*pattern), rotary=make_rotary(16))


@pytest.mark.parametrize("at", [3, 5, 20])
@pytest.mark.parametrize("has_rope", [True, False], ids=["rope", "alibi"])
def test_a_policy_with_keys_of_the_middle_at_one_distance(at: int, has_rope: bool) -> None:
    """Which the package doesn't have: the oracle follows the intervals of any."""
    around, middle = LambdaPattern(3, 6, 8), range(9, 14)

    def distance_of(i: int, j: int) -> int | None:
        return at if j in middle and i - j >= 6 else lambda_distance(around, i, j)

    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    assert_is_literal(
        WithMiddle(around, middle, at),
        rotary=make_rotary(16) if has_rope else None,
        alibi_slopes=None if has_rope else slopes,
        distance_of=distance_of,
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_alibi(pattern: tuple[int, int, int]) -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    assert_is_literal(LambdaPattern(*pattern), alibi_slopes=slopes)


@pytest.mark.parametrize("pattern", PATTERNS[::3], ids=str)
def test_no_positional_encoding(pattern: tuple[int, int, int]) -> None:
    assert_is_literal(LambdaPattern(*pattern))


@pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("rotary_dim", [4, 16])
def test_partial_rotary_and_pairings(rotary_dim: int, is_neox_style: bool) -> None:
    assert_is_literal(LambdaPattern(3, 6, 8), rotary=make_rotary(rotary_dim, is_neox_style))


def test_magnitude_scales_near_and_far_scores_alike() -> None:
    assert_is_literal(LambdaPattern(3, 6, 8), rotary=make_rotary(8, magnitude=1.3))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (9, 3)], ids=str)
def test_heads_in_groups(heads: tuple[int, int]) -> None:
    assert_is_literal(LambdaPattern(3, 6, 8), num_keys=20, heads=heads, rotary=make_rotary(16))


@pytest.mark.parametrize("query_start", [1, 12, 29])
def test_queries_that_start_later(query_start: int) -> None:
    assert_is_literal(LambdaPattern(3, 6, 8), query_start=query_start, rotary=make_rotary(16))


@pytest.mark.parametrize("num_keys", [1, 2, 16])
def test_near_the_start_it_is_plain_causal_attention(num_keys: int) -> None:
    """Up to n_local tokens, whatever the prefix and the limit."""
    rotary = make_rotary(16)
    query, key, value = draw(num_keys, num_keys, heads=(4, 4))
    positions = torch.arange(num_keys)
    plain = F.scaled_dot_product_attention(
        turn(query, positions, rotary).transpose(0, 1),
        turn(key, positions, rotary).transpose(0, 1),
        value.transpose(0, 1),
        is_causal=True,
        scale=0.25,
    ).transpose(0, 1)
    for n_global, limit in [(0, 16), (3, 16), (100, 500)]:
        output = lambda_attention(
            query, key, value, LambdaPattern(n_global, 16, limit), scale=0.25, rotary=rotary
        )
        torch.testing.assert_close(output, plain, rtol=0, atol=EXACT)


def test_without_a_prefix_it_is_a_sliding_window() -> None:
    rotary = make_rotary(16)
    query, key, value = draw(40, 40, heads=(4, 4))
    positions = torch.arange(40)
    behind = positions[:, None] - positions
    plain = F.scaled_dot_product_attention(
        turn(query, positions, rotary).transpose(0, 1),
        turn(key, positions, rotary).transpose(0, 1),
        value.transpose(0, 1),
        attn_mask=(behind >= 0) & (behind < 9),
        scale=0.25,
    ).transpose(0, 1)
    output = lambda_attention(query, key, value, LambdaPattern(0, 9, 9), scale=0.25, rotary=rotary)
    torch.testing.assert_close(output, plain, rtol=0, atol=EXACT)


def test_hidden_keys_have_no_say() -> None:
    query, key, value = draw(1, 40)
    pattern, rotary = LambdaPattern(3, 6, 8), make_rotary(16)
    arguments = {"scale": 0.25, "rotary": rotary, "query_start": 39}
    before = lambda_attention(query, key, value, pattern, **arguments)
    key[3:34] = 1e6
    value[3:34] = 1e6
    assert torch.equal(lambda_attention(query, key, value, pattern, **arguments), before)
    key[34] = 0
    assert not torch.equal(lambda_attention(query, key, value, pattern, **arguments), before)


def test_a_far_prefix_scores_the_same_from_anywhere() -> None:
    """Beyond the limit a global key's score no longer depends on where the query is: its result is
    the same at 49 and at 499 if its window holds the same keys."""
    pattern, rotary = LambdaPattern(3, 6, 8), make_rotary(16)
    query, key, value = draw(1, 500)
    near = torch.cat((key[:44], key[-6:])), torch.cat((value[:44], value[-6:]))
    at_49 = lambda_attention(query, *near, pattern, scale=0.3, rotary=rotary, query_start=49)
    at_499 = lambda_attention(query, key, value, pattern, scale=0.3, rotary=rotary, query_start=499)
    torch.testing.assert_close(at_49, at_499, rtol=0, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_the_same_attention(dtype: torch.dtype) -> None:
    query, key, value = draw(30, 30)
    pattern, rotary = LambdaPattern(3, 6, 8), make_rotary(16)
    exact = lambda_attention(query, key, value, pattern, scale=0.25, rotary=rotary)
    output = lambda_attention(
        query.to(dtype), key.to(dtype), value.to(dtype), pattern, scale=0.25, rotary=rotary
    )
    assert output.dtype == dtype
    # A score is a sum of 16 products of numbers of size 1, a result an average of such numbers:
    # a few dozen roundings.
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=32 * torch.finfo(dtype).eps)
