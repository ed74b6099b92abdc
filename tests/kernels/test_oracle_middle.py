"""The oracle with the middle recalled, against its definition, key by key in float64."""

import math
from itertools import pairwise

import pytest
import torch

from tests.kernels.batches import make_rotary, turn
from tests.kernels.test_oracle import EXACT, draw
from vllm_lminf.kernels.oracle import lambda_attention
from vllm_lminf.middle import ALL_ROWS, Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotarySpec

PATTERN = LambdaPattern(n_global=3, n_local=6, distance_limit=8)


def product(query: torch.Tensor, key: torch.Tensor, distance: int, rotary: RotarySpec) -> float:
    """Of one head's query and key, both not rotated, so far apart."""
    turned = turn(query[None, None], torch.tensor([distance]), rotary)[0, 0]
    still = turn(key[None, None], torch.tensor([0]), rotary)[0, 0]
    return float(turned @ still)


def best_units(
    query: torch.Tensor,
    keys: torch.Tensor,
    candidates: list[int],
    middle: Middle,
    rotary: RotarySpec,
) -> list[int]:
    """The positions that heads with a key head in common recall.

    Args:
        query: of these heads; [heads, head_size].
        keys: of the key head; [num_keys, head_size].
        candidates: the middle.
    """
    units: dict[int, list[int]] = {}
    for j in candidates:
        units.setdefault(j // middle.block_size, []).append(j)

    def worse(unit: int) -> tuple[float, int]:
        return -max(
            product(q, keys[j], middle.distance, rotary) for q in query for j in units[unit]
        ), unit

    return [j for unit in sorted(units, key=worse)[: middle.top_k] for j in units[unit]]


def literal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: LambdaPattern,
    middle: Middle,
    prompt_len: int,
    query_start: int,
    scale: float,
    rotary: RotarySpec,
) -> torch.Tensor:
    """See `lambda_attention`."""
    output = torch.empty_like(query)
    num_heads = query.shape[1]
    group = num_heads // key.shape[1]
    for row in range(len(query)):
        i = query_start + row
        seen = {
            j: min(i - j, pattern.distance_limit)
            for j in range(i + 1)
            if j < pattern.n_global or i - j < pattern.n_local
        }
        looks = i >= prompt_len - middle.rows
        hidden = [j for j in range(i + 1) if j not in seen] if looks else []
        for h in range(num_heads):
            kv, first = h // group, h // group * group
            heads = range(first, first + group) if middle.block_size > 1 else [h]
            recalled = best_units(query[row, list(heads)], key[:, kv], hidden, middle, rotary)
            pairs = seen | dict.fromkeys(recalled, middle.distance)
            scores = torch.tensor(
                [scale * product(query[row, h], key[j, kv], d, rotary) for j, d in pairs.items()],
                dtype=torch.float64,
            )
            output[row, h] = scores.softmax(0) @ value[list(pairs), kv]
    return output


def assert_is_literal(
    middle: Middle,
    pattern: LambdaPattern = PATTERN,
    num_keys: int = 26,
    query_start: int = 0,
    prompt_len: int = 0,
    heads: tuple[int, int] = (4, 2),
    rotary: RotarySpec | None = None,
) -> None:
    query, key, value = draw(num_keys - query_start, num_keys, heads)
    rotary = rotary or make_rotary(16)
    output = lambda_attention(
        query,
        key,
        value,
        pattern,
        scale=0.3,
        rotary=rotary,
        query_start=query_start,
        middle=middle,
        prompt_len=prompt_len,
    )
    expected = literal(query, key, value, pattern, middle, prompt_len, query_start, 0.3, rotary)
    assert output.isfinite().all()
    torch.testing.assert_close(output, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("block_size", [1, 2, 4, 5, 100])
@pytest.mark.parametrize("top_k", [1, 3, 30])
def test_units(top_k: int, block_size: int) -> None:
    """The blocks of 4 and 5 are cut by the prefix, at 3, and by most windows."""
    assert_is_literal(Middle(top_k, distance=7, rows=ALL_ROWS, block_size=block_size))


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("pattern", [(0, 1, 1), (0, 7, 7), (1, 7, 9), (40, 3, 3), (2, 40, 40)])
def test_patterns(pattern: tuple[int, int, int], block_size: int) -> None:
    """Under the last two there is no middle."""
    middle = Middle(2, distance=5, rows=ALL_ROWS, block_size=block_size)
    assert_is_literal(middle, LambdaPattern(*pattern))


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (9, 3)], ids=str)
def test_heads_in_groups(heads: tuple[int, int], block_size: int) -> None:
    middle = Middle(2, distance=5, rows=ALL_ROWS, block_size=block_size)
    assert_is_literal(middle, num_keys=18, heads=heads)


@pytest.mark.parametrize("rotary_dim", [4, 16])
@pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "gptj"])
def test_rotations(rotary_dim: int, is_neox_style: bool) -> None:
    rotary = make_rotary(rotary_dim, is_neox_style, magnitude=1.2)
    assert_is_literal(Middle(3, distance=11, rows=ALL_ROWS), rotary=rotary)


@pytest.mark.parametrize("num_keys", [1, 2, 9, 10, 11, 12, 13])
def test_where_the_middle_begins(num_keys: int) -> None:
    """The query at 9 has the first middle key, that at 11 as many as are recalled."""
    assert_is_literal(Middle(3, distance=7, rows=ALL_ROWS), num_keys=num_keys)


@pytest.mark.parametrize(("rows", "prompt_len"), [(1, 20), (4, 20), (30, 20), (1, 1), (2, 26)])
def test_who_looks(rows: int, prompt_len: int) -> None:
    assert_is_literal(Middle(2, distance=7, rows=rows), prompt_len=prompt_len)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object
) -> torch.Tensor:
    return lambda_attention(query, key, value, PATTERN, scale=0.3, **options)


@pytest.mark.parametrize("block_size", [1, 4])
def test_chunks_are_the_whole(block_size: int) -> None:
    query, key, value = draw(26, 26)
    middle = Middle(2, distance=7, rows=5, block_size=block_size)
    options = {"rotary": make_rotary(16), "middle": middle, "prompt_len": 20}
    whole = attend(query, key, value, **options)
    for cuts in [(0, 26), (0, 1, 14, 15, 16, 26), (0, 19, 20, 26), tuple(range(27))]:
        chunks = [
            attend(query[start:end], key[:end], value[:end], query_start=start, **options)
            for start, end in pairwise(cuts)
        ]
        torch.testing.assert_close(torch.cat(chunks), whole, rtol=0, atol=EXACT)


@pytest.mark.parametrize("has_rope", [True, False], ids=["rope", "alibi"])
def test_nothing_recalled_is_nothing_changed(has_rope: bool) -> None:
    """To the bit: with no units, in rows that don't look, and where there is no middle yet."""
    query, key, value = draw(26, 26)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    options = {"rotary": make_rotary(16)} if has_rope else {"alibi_slopes": slopes}
    plain = attend(query, key, value, **options)
    assert torch.equal(plain, attend(query, key, value, middle=Middle(0, 7, ALL_ROWS), **options))
    some = attend(query, key, value, middle=Middle(2, 7, rows=3), prompt_len=23, **options)
    changed = (some != plain).flatten(1).any(dim=1)
    assert changed.tolist() == [i >= 20 for i in range(26)]
    every = attend(query, key, value, middle=Middle(2, 7, rows=ALL_ROWS), **options)
    changed = (every != plain).flatten(1).any(dim=1)
    assert changed.tolist() == [i >= 9 for i in range(26)]


@pytest.mark.parametrize("block_size", [1, 2])
def test_of_equals_the_first_are_recalled(block_size: int) -> None:
    query, key, value = draw(1, 26, heads=(2, 1))
    key[3:20] = key[3]
    middle = Middle(2, distance=7, rows=ALL_ROWS, block_size=block_size)
    options = {"rotary": make_rotary(16), "query_start": 25, "middle": middle}
    before = attend(query, key, value, **options)
    recalled = [j for j in range(26) if 3 <= j < 20 and j // block_size < 3 // block_size + 2]
    others = [j for j in range(3, 20) if j not in recalled]
    value[others] = 1e6
    assert torch.equal(attend(query, key, value, **options), before)
    value[recalled] = 0
    assert not torch.equal(attend(query, key, value, **options), before)


def test_softcap_bias_and_sinks_meet_recalled_keys_as_they_meet_others() -> None:
    """One query, whose middle is recalled whole, in a model that rotates nothing."""
    query, key, value = draw(1, 26, heads=(4, 2))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    sinks = torch.tensor([0.1, -0.4, 2.0, 0.0], dtype=torch.float64)
    output = attend(
        query,
        key,
        value,
        softcap=2.0,
        alibi_slopes=slopes,
        sinks=sinks,
        query_start=25,
        middle=Middle(100, distance=7, rows=ALL_ROWS),
    )
    distances = [min(25 - j, 8) if j < 3 or 25 - j < 6 else 7 for j in range(26)]
    for h in range(4):
        weights = [
            math.exp(
                2.0 * math.tanh(float(query[0, h] @ key[j, h // 2]) * 0.3 / 2.0) - slopes[h] * d
            )
            for j, d in enumerate(distances)
        ]
        total = sum(weights) + math.exp(sinks[h])
        expected = sum(w * value[j, h // 2] for j, w in enumerate(weights)) / total
        torch.testing.assert_close(output[0, h], expected, rtol=0, atol=EXACT)


def test_blocks_are_ranked_before_the_bias() -> None:
    """Heads of one key head whose slopes differ: the block of the largest product comes first,
    although the head that has it loses the most by its distance."""
    query = torch.eye(2, dtype=torch.float64)[None] * torch.tensor([[3.0], [2.0]]).double()
    key = torch.zeros(20, 1, 2, dtype=torch.float64)
    key[4, 0] = torch.tensor([1.0, 0.0])  # scores 3 with head 0
    key[8, 0] = torch.tensor([0.0, 1.0])  # scores 2 with head 1
    value = torch.zeros_like(key)
    value[8] = 1e6
    output = attend(
        query,
        key,
        value,
        alibi_slopes=torch.tensor([1.0, 0.0]),
        query_start=19,
        middle=Middle(1, distance=7, rows=ALL_ROWS, block_size=2),
    )
    assert output.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """Which keys are the best may be decided by rounding, so all are recalled."""
    query, key, value = draw(26, 26)
    options = {"rotary": make_rotary(16), "middle": Middle(30, distance=7, rows=ALL_ROWS)}
    exact = attend(query, key, value, **options)
    output = attend(query.to(dtype), key.to(dtype), value.to(dtype), **options)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=32 * torch.finfo(dtype).eps)
