"""Attention against the oracle, on a cache that holds NaN wherever nobody wrote."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.batches import Batch, Case, make_batch
from tests.kernels.cases import assert_close
from tests.kernels.triton.cases import (
    FAR,
    OTHERS,
    PATTERNS,
    RULES,
    SERVED,
    exact_and_tolerance,
    far_by_id,
    rules_case,
    rules_of,
)
from vllm_lminf.kernels.base import DeviceBatch, Heads, PagedCache
from vllm_lminf.kernels.triton import plan as plan_module
from vllm_lminf.kernels.triton.layer import TritonKernel
from vllm_lminf.kernels.triton.plan import Plan, decode_plan, prefill_plan
from vllm_lminf.pattern import LambdaPattern


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiles_small(monkeypatch)


def make_tiles_small(monkeypatch: pytest.MonkeyPatch, rows: int = 16, keys: int = 16) -> None:
    """Tiles that put many edges, splits and shares into short sequences."""

    def shrink(make: Callable[..., Plan]) -> Callable[..., Plan]:
        def plan(heads, *arguments):  # type: ignore[no-untyped-def]
            sizes = make(heads, *arguments)
            fewer = min(sizes.rows, max(rows, heads.num_heads // heads.num_kv_heads))
            fewer = 1 << (fewer - 1).bit_length()
            group = heads.num_heads // heads.num_kv_heads
            return dataclasses.replace(
                sizes, rows=fewer, queries=fewer // group, keys=keys, global_keys=16
            )

        return plan

    monkeypatch.setattr(plan_module, "prefill_plan", shrink(prefill_plan))
    monkeypatch.setattr(plan_module, "decode_plan", shrink(decode_plan))


@pytest.mark.parametrize("case", SERVED[:-1:3] + OTHERS, ids=lambda case: case.id)
def test_the_oracle(case: Case) -> None:
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, torch.float32)
    output = batch.run_triton(torch.float32)
    assert output.dtype == torch.float32
    assert_close(output, exact, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SERVED[1:-1:9] + OTHERS[2::4], ids=lambda case: case.id)
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, dtype)
    output = batch.run_triton(dtype)
    assert output.dtype == dtype
    assert_close(output, exact, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("cache_dtype", "scales"),
    [
        (torch.float8_e4m3fn, (0.5, 0.25)),
        (torch.float8_e5m2, (2.0, 0.125)),
        (torch.float8_e4m3fn, None),
    ],
    ids=str,
)
def test_fp8_cache(
    cache_dtype: torch.dtype, scales: tuple[float, float] | None, dtype: torch.dtype
) -> None:
    """Keys and values that fp8 can hold: what is left is the kernel's doing."""
    batch = make_batch(Case("mixed", ((120, 1), (0, 20), (64, 33), (300, 2)), pattern=(17, 40, 45)))
    batch.quantise(cache_dtype, *(scales or (1.0, 1.0)))
    exact, tolerance = exact_and_tolerance(batch, dtype)
    cache = batch.empty_cache(cache_dtype)
    if scales is not None:
        key_scale, value_scale = (torch.tensor([scale]) for scale in scales)
        cache = dataclasses.replace(cache, key_scale=key_scale, value_scale=value_scale)
    assert_close(batch.run_triton(dtype, cache=cache), exact, tolerance)


@far_by_id
def test_far_positions(case: Case) -> None:
    """Up to 2**31 - 1. Inputs are rounded to float32 once, sums of up to 80 terms of size 1 are
    formed in it, and two rotations of a far pair are off by 5e-7 rad each at the most."""
    batch = make_batch(case)
    assert_close(batch.run_triton(torch.float32), batch.run_literal(), 3e-6)


@pytest.mark.parametrize(
    ("names", "pattern"),
    [*zip(RULES, PATTERNS + PATTERNS, strict=False), ("alibi+softcap+sinks", PATTERNS[0])],
    ids=str,
)
def test_rules(names: str, pattern: tuple[int, int, int]) -> None:
    batch = make_batch(rules_case(names, pattern))
    rules = rules_of(names, batch)
    exact, tolerance = exact_and_tolerance(batch, torch.float32, rules)
    assert_close(batch.run_triton(torch.float32, rules), exact, tolerance)


@pytest.mark.parametrize("names", ["alibi+sinks", "softcap+sinks"])
def test_rules_of_splits(names: str) -> None:
    """A sink is counted once, whatever the number of programs."""
    case = rules_case(names, (10, 300, 320))
    batch = make_batch(dataclasses.replace(case, requests=((400, 1), (0, 2), (330, 2))))
    rules = rules_of(names, batch)
    exact, tolerance = exact_and_tolerance(batch, torch.float32, rules)
    assert_close(batch.run_triton(torch.float32, rules), exact, tolerance)


@pytest.mark.parametrize(
    ("pattern", "block_size"),
    [((10, 33, 33), 16), ((16, 17, 21), 48), ((0, 16, 16), 16), ((33, 5, 5), 32)],
    ids=str,
)
def test_every_boundary(pattern: tuple[int, int, int], block_size: int, small_tiles: None) -> None:
    """Every length up to well past the window, the prefix and a few blocks, as the length before a
    decode step, and many as that before a chunk; in tiles of 16 keys."""
    lengths = range(pattern[0] + pattern[2] + 34)
    requests = [(n, 1) for n in lengths] + [(n, 17) for n in lengths[::9]]
    small = {"heads": (2, 1), "head_size": 16}
    case = Case("all", tuple(requests), block_size=block_size, pattern=pattern, **small)
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, torch.float32)
    assert_close(batch.run_triton(torch.float32), exact, tolerance)


@pytest.mark.parametrize("splits", [3, 17])
def test_any_number_of_splits(
    splits: int, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer than a request has tiles, and more; as many as are merged at a time, and more. One
    request fills its tile of 8 queries, one has more and is not split."""
    monkeypatch.setattr(plan_module, "num_splits", lambda *_: splits)
    requests = ((400, 1), (3, 1), (350, 8), (330, 9), (0, 2))
    case = Case("all", requests, heads=(2, 1), head_size=24, pattern=(20, 300, 320))
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, torch.float32)
    assert_close(batch.run_triton(torch.float32), exact, tolerance)


def test_on_a_cpu_batches_are_split_too() -> None:
    """So that the tests here see splits as they are planned."""
    hardware = plan_module.hardware_of(torch.device("cpu"))
    heads = Heads(4, 2, 64, torch.float32)
    for num_requests in (1, 2, 3, 4):
        step = plan_module.plan_step(
            heads, LambdaPattern(10, 300, 300), torch.float32, hardware, num_requests, 1
        )
        assert step.splits > 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_local = draw(st.integers(1, 80))
    limit = n_local + draw(st.sampled_from([0, 0, 1, 13, 200]))
    num_kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 5))
    head_size = draw(st.sampled_from([16, 24, 40]))
    requests = draw(
        st.lists(
            st.tuples(st.integers(0, 250), st.sampled_from([1, 1, 2, 5, 17, 60])),
            min_size=1,
            max_size=3,
        )
    )
    return Case(
        "random",
        tuple(requests),
        heads=(num_kv_heads * group, num_kv_heads),
        head_size=head_size,
        block_size=16 * draw(st.integers(1, 4)),
        pattern=(draw(st.integers(0, 60)), n_local, limit),
        rotary_dim=draw(st.sampled_from([0, 4, 8, head_size])),
        is_neox_style=draw(st.booleans()),
    )


@given(
    case=cases(),
    seed=st.integers(0, 2**16),
    keys=st.sampled_from([16, 32]),
    rows=st.sampled_from([8, 16, 32]),
)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_random_batches(case: Case, seed: int, keys: int, rows: int) -> None:
    batch = make_batch(case, seed)
    exact, tolerance = exact_and_tolerance(batch, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        make_tiles_small(patch, rows, keys)
        assert_close(batch.run_triton(torch.float32), exact, tolerance)


class TestRowsAndStrides:
    """What lies where, what is written, and what is not."""

    @pytest.fixture
    def batch(self) -> Batch:
        return make_batch(Case("mixed", ((300, 1), (20, 9), (0, 5)), pattern=(10, 150, 150)))

    def test_memory_orders_of_the_cache(self, batch: Batch) -> None:
        expected = batch.run_triton(torch.float32)
        cache = batch.empty_cache(torch.float32, heads_first=False)
        assert torch.equal(batch.run_triton(torch.float32, cache=cache), expected)
        # Keys and values side by side in one tensor, as vLLM's CPU cache has them.
        num_blocks, num_kv_heads, block_size, head_size = cache.key.shape
        both = torch.full((num_blocks, num_kv_heads, 2, block_size, head_size), torch.nan)
        halves = dataclasses.replace(cache, key=both[:, :, 0], value=both[:, :, 1])
        assert torch.equal(batch.run_triton(torch.float32, cache=halves), expected)

    def test_dimensions_that_a_head_does_not_have(self) -> None:
        """Tiles are as wide as a power of two: what lies behind a head's last dimension, NaN here,
        isn't read."""
        case = Case("mixed", ((300, 1), (20, 9), (0, 5)), head_size=24, pattern=(10, 150, 170))
        batch = make_batch(case)
        expected = batch.run_triton(torch.float32)
        blocks, heads, tokens, dims = batch.empty_cache(torch.float32).key.shape
        wide = torch.full((2, blocks, heads, tokens, 2 * dims), torch.nan)
        cache = PagedCache(*wide[..., :dims])
        assert torch.equal(batch.run_triton(torch.float32, cache=cache), expected)

    def test_rows_that_lie_apart_and_padding(self, batch: Batch) -> None:
        """Queries are slices of a wider projection; rows past the batch stay as they are."""
        expected = batch.run_triton(torch.float32)
        layer = TritonKernel(batch.layer(torch.float32, rules_of("", batch)))
        cache = batch.empty_cache(torch.float32)
        batch.fill(layer, cache, torch.float32)
        num_tokens, num_heads, head_size = expected.shape
        rows = torch.full((num_tokens + 4, 2 * num_heads, head_size), torch.nan)
        rows[:num_tokens, :num_heads] = batch.query(torch.float32)
        outputs = torch.full((num_tokens + 4, num_heads + 1, 2 * head_size), -7.0)
        output = outputs[:, 1:, :head_size]
        layer.attend(rows[:, :num_heads], cache, batch.device_batch(), output)
        assert torch.equal(output[:num_tokens], expected)
        outputs[:num_tokens, 1:, :head_size] = -7.0
        assert (outputs == -7.0).all()
        assert rows[num_tokens:].isnan().all()

    @pytest.mark.parametrize("stale", [0, 3, 1000, 2**31 - 1])
    def test_padding_requests(self, batch: Batch, stale: int) -> None:
        """No rows, and whatever length was left behind; their blocks are never looked up."""
        expected = batch.run_triton(torch.float32)
        layer = TritonKernel(batch.layer(torch.float32, rules_of("", batch)))
        cache = batch.empty_cache(torch.float32)
        batch.fill(layer, cache, torch.float32)
        told = batch.device_batch()
        padded = DeviceBatch(
            torch.cat((told.query_start_loc, told.query_start_loc[-1:].expand(3))),
            torch.cat((told.seq_lens, torch.full((3,), stale, dtype=torch.int32))),
            torch.cat((told.block_table, torch.full_like(told.block_table, 2**30))),
            told.max_query_len,
        )
        output = torch.full_like(expected, torch.nan)
        layer.attend(batch.query(torch.float32), cache, padded, output)
        # The number of requests decides on splits, and these on the order of sums.
        assert_close(output, expected, 1e-6)

    def test_requests_do_not_mix(self, batch: Batch) -> None:
        """A request among others, and among empty ones: equal to the bit."""
        together = batch.run_triton(torch.float32)
        layer = TritonKernel(batch.layer(torch.float32, rules_of("", batch)))
        cache = batch.empty_cache(torch.float32)
        batch.fill(layer, cache, torch.float32)
        told, query = batch.device_batch(), batch.query(torch.float32)
        for request in range(3):
            start, end = batch.query_start_loc[request : request + 2]
            bounds = [0] * (request + 1) + [end - start] * (3 - request)
            alone = dataclasses.replace(
                told, query_start_loc=torch.tensor(bounds, dtype=torch.int32)
            )
            output = torch.full_like(query[start:end], torch.nan)
            layer.attend(query[start:end], cache, alone, output)
            assert torch.equal(output, together[start:end])

    def test_the_bound_on_queries_may_be_loose(self, batch: Batch) -> None:
        """As a captured graph's is: its launch serves any batch that fits."""
        expected = batch.run_triton(torch.float32)
        layer = TritonKernel(batch.layer(torch.float32, rules_of("", batch)))
        cache = batch.empty_cache(torch.float32)
        batch.fill(layer, cache, torch.float32)
        for bound in (10, 21, 500):
            told = dataclasses.replace(batch.device_batch(), max_query_len=bound)
            output = torch.full_like(expected, torch.nan)
            layer.attend(batch.query(torch.float32), cache, told, output)
            assert_close(output, expected, 1e-6)

    def test_nothing_to_do(self, batch: Batch) -> None:
        layer = TritonKernel(batch.layer(torch.float32, rules_of("", batch)))
        cache, told = batch.empty_cache(torch.float32), batch.device_batch()
        query = batch.query(torch.float32)
        layer.attend(query[:0], cache, told, query[:0])
        none = DeviceBatch(told.query_start_loc[:1], told.seq_lens[:0], told.block_table[:0], 0)
        output = torch.full_like(query, -7.0)
        layer.attend(query, cache, none, output)
        assert (output == -7.0).all()


def test_far_cases_reach_the_end() -> None:
    """The tables of positions above are what they claim to be."""
    assert max(sum(request) for case in FAR for request in case.requests) == 2**31 - 1
