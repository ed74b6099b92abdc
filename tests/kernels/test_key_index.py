"""The index of quantised keys: what it takes, and that its bounds and what it certifies hold."""

import pytest
import torch

from vllm_lminf.kernels.key_index import BITS, Found, IndexFormat, KeyIndex, search

KINDS = ["normal", "equal", "zero", "huge", "tiny", "outliers", "far", "line", "codes", "bfloat16"]


def draw_keys(kind: str, num_keys: int, num_kv_heads: int, head_size: int) -> torch.Tensor:
    """Keys, float32 but for the last kind, that each strain something else."""
    generator = torch.Generator().manual_seed(num_keys + head_size)
    shape = (num_keys, num_kv_heads, head_size)
    normal = torch.randn(*shape, generator=generator)
    return {
        "normal": normal,
        "equal": normal[:1].expand(shape).clone(),
        "zero": torch.zeros(shape),
        "huge": normal * 1e36,  # some products are beyond float32
        "tiny": normal * 1e-38,  # some elements are subnormal
        "outliers": normal * torch.where(torch.rand(*shape, generator=generator) < 0.02, 1e4, 1.0),
        "far": normal * 1e-3 + 1e3,  # what is left of a key is rounding
        "line": normal[:, :, :1] * normal[:1],
        "codes": (4 * normal).round(),  # exact in float32, with many equals
        "bfloat16": normal.bfloat16(),
    }[kind]


def draw_query(num_queries: int, num_heads: int, head_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_queries)
    return torch.randn(num_queries, num_heads, head_size, generator=generator)


def products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Of every query head with every key; [num_queries, num_heads, num_keys], in their dtype."""
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return torch.einsum("qhd,khd->qhk", query, repeated)


def scan(index: KeyIndex, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimates and bounds, [num_queries, num_heads, num_keys]."""
    estimate, bound = index.scan(query)

    def by_query(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, len(query))).flatten(0, 1).transpose(0, 1)

    return by_query(estimate), by_query(bound)


@pytest.mark.parametrize("centred", [True, False], ids=["mean", "origin"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_bounds_hold(bits: int, kind: str, centred: bool) -> None:
    """For random queries, for long and short ones, for the keys themselves and for what rounding to
    bits has left of them, which is where the bound is reached."""
    key = draw_keys(kind, 60, 2, 64)
    centre = key.double().mean(dim=0) if centred else torch.zeros(2, 64)
    index = KeyIndex.of(key, bits, centre)
    as_stored = scan(index, torch.eye(64).unsqueeze(1).expand(-1, 2, -1))[0].permute(2, 1, 0)
    drawn = draw_query(20, 2, 64)
    left = key.float() - as_stored
    for query in (drawn, drawn * 1e20, drawn * 1e-44, key.float(), left):
        estimate, bound = scan(index, query)
        assert estimate.isfinite().all()
        assert (bound >= 0).all()
        exact = products(query.double(), key.double())
        assert ((estimate.double() - exact).abs() <= bound.double()).all()
        highest = (estimate + bound).double()
        ahead, behind = products(query, key.float()), products(query.flip(-1), key.float().flip(-1))
        for scores in (ahead, behind):
            finite = scores.isfinite()
            assert (scores.double() <= highest)[finite].all()


@pytest.mark.parametrize("bits", BITS)
def test_bounds_are_no_wider_than_they_must_be(bits: int) -> None:
    """A query along what rounding to bits has left of a key reaches its bound."""
    key = draw_keys("normal", 60, 1, 64)
    index = KeyIndex.of(key, bits, torch.zeros(1, 64))
    as_stored = scan(index, torch.eye(64)[:, None])[0].permute(2, 1, 0)
    left = key - as_stored
    estimate, bound = scan(index, left)
    error = (products(left, key) - estimate).diagonal(dim1=0, dim2=2)
    assert (bound.diagonal(dim1=0, dim2=2) / error).mean() < 1.02


@pytest.mark.parametrize("head_size", [8, 64, 80])
@pytest.mark.parametrize("bits", BITS)
def test_more_bits_leave_less(bits: int, head_size: int) -> None:
    """The root mean square of what is left is no more than a uniform rounding of a Gaussian's
    central part leaves."""
    key = draw_keys("normal", 500, 1, head_size)
    radius = KeyIndex.of(key, bits, torch.zeros(1, head_size)).radius.float()
    share = (radius / key.norm(dim=-1).T).square().mean().sqrt()
    assert share < {1: 0.62, 2: 0.36, 3: 0.2, 4: 0.11, 8: 0.01}[bits]


@pytest.mark.parametrize("head_size", [8, 64, 80, 128])
@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_of_the_formula(bits: int, head_size: int) -> None:
    key = draw_keys("normal", 30, 2, head_size)
    index = KeyIndex.of(key, bits, key.mean(dim=0))
    stored = sum(x.nbytes for x in (index.codes, index.scale, index.radius))
    assert index.num_bytes == stored == 30 * 2 * (head_size * bits // 8 + 4)
    assert index.format == IndexFormat(bits, head_size)
    assert index.num_keys == 30


def assert_best(found: Found, scores: torch.Tensor, num_visible: list[int], top_k: int) -> None:
    """What is certified is right.

    Args:
        found: what was found.
        scores: of all keys, exact; [num_queries, num_heads, num_keys].
        num_visible: keys that each query looks at.
        top_k: keys that each query head gets.
    """
    assert found.keys.shape == found.scores.shape == (*scores.shape[:2], top_k)
    for row, visible in enumerate(num_visible):
        for head in range(scores.shape[1]):
            if not found.certified[row, head]:
                continue
            of = scores[row, head, :visible].tolist()
            best = sorted(range(visible), key=lambda j: (-of[j], j))[:top_k]
            missing = top_k - len(best)
            assert found.keys[row, head].tolist() == best + [-1] * missing
            expected = [of[j] for j in best] + [-float("inf")] * missing
            torch.testing.assert_close(found.scores[row, head], torch.tensor(expected))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3)], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_certified_is_the_top_k(bits: int, heads: tuple[int, int]) -> None:
    """Of whole numbers, whose products are exact and often equal."""
    key = draw_keys("codes", 300, heads[1], 64)
    query = (2 * draw_query(7, heads[0], 64)).round()
    index = KeyIndex.of(key, bits, key.mean(dim=0))
    num_visible = [0, 1, 4, 5, 6, 299, 300]
    scores = products(query, key)
    certified = []
    for num_candidates in (5, 20, 100, 300):
        found = search(query, key, index, torch.tensor(num_visible), 5, num_candidates)
        assert_best(found, scores, num_visible, 5)
        certified.append(found.certified.float().mean().item())
    assert certified == sorted(certified)
    assert certified[-1] == 1.0
    assert bits < 8 or certified[1] > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_every_kind(kind: str) -> None:
    """With float32 products in the order of the search, so that the same are equal."""
    key, query = draw_keys(kind, 100, 2, 64), draw_query(10, 4, 64)
    index = KeyIndex.of(key, 8, key.double().mean(dim=0))
    num_visible = [100] * 10
    whole = search(query, key, index, torch.tensor(num_visible), 100, 100)
    scores = torch.empty(10, 4, 100).scatter_(-1, whole.keys.clamp(min=0), whole.scores)
    if kind != "huge":
        torch.testing.assert_close(scores, products(query, key.float()), rtol=1e-4, atol=1e-4)
        assert whole.certified.all()
    found = search(query, key, index, torch.tensor(num_visible), 5, 12)
    assert_best(found, scores, num_visible, 5)
    if kind in ("equal", "zero"):
        assert not found.certified.any()  # which of them are the first isn't known
    if kind in ("normal", "bfloat16"):
        assert found.certified.float().mean() > 0.9


def test_a_key_beyond_all_numbers_is_never_certified_away() -> None:
    key, query = draw_keys("normal", 50, 1, 64), draw_query(3, 1, 64)
    key[20] = 3e38
    index = KeyIndex.of(key, 4, torch.zeros(1, 64))
    assert scan(index, query)[1][:, :, 20].isinf().all()
    found = search(query, key, index, torch.full((3,), 50), 1, 10)
    assert (found.keys[..., 0] == 20).logical_or(~found.certified).any()
    ordinary = torch.arange(50) != 20
    assert scan(index, query)[1][:, :, ordinary].isfinite().all()


def test_fewer_keys_than_are_asked_for() -> None:
    key, query = draw_keys("normal", 3, 1, 64), draw_query(2, 1, 64)
    index = KeyIndex.of(key, 2, torch.zeros(1, 64))
    found = search(query, key, index, torch.tensor([2, 3]), 5, 8)
    assert found.certified.all()
    assert_best(found, products(query, key), [2, 3], 5)


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match=r"bits is 5.*head_size is 12: it must be a multiple of 8"):
        IndexFormat(5, 12)
    key = draw_keys("normal", 3, 1, 64)
    index = KeyIndex.of(key, 2, torch.zeros(1, 64))
    with pytest.raises(ValueError, match="num_candidates is 4, below top_k, which is 5"):
        search(draw_query(1, 1, 64), key, index, torch.tensor([3]), 5, 4)
