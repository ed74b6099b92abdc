"""The paged kernel against the oracle, on a cache that holds NaN wherever it must not look."""

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.batches import Batch, Case, make_batch, make_rotary
from tests.kernels.cases import CASES, FAR_CASES, VERY_FAR_CASES, assert_close
from tests.kernels.layers import int32_batch, joint_cache, make_layer
from vllm_lminf.kernels import oracle
from vllm_lminf.kernels.base import DeviceBatch, Heads, ScoreRules
from vllm_lminf.kernels.host_batch import inverse_rotations
from vllm_lminf.kernels.reference import ReferenceKernel, _eager_attention
from vllm_lminf.pattern import LambdaPattern, cdiv
from vllm_lminf.rope import RotationTables

EXACT = 1e-11
"""With exact inverse rotations all is float64 throughout, and angles stay below 3e3 rad: their
phases are good to 1e-12, and sums have some thousand terms of size 1."""
FAR_EXACT = 1e-8
"""The same where angles reach 2e6 rad."""

by_id = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.fixture(params=["fused", "eager"])
def operator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the CPU's fused operator and again with what stands in for it elsewhere."""
    if request.param == "eager":

        def stand_in(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            dropout_p: float,
            is_causal: bool,
            *,
            attn_mask: torch.Tensor | None,
            scale: float,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            assert dropout_p == 0
            assert not is_causal
            return _eager_attention(query, key, value, attn_mask, ScoreRules(scale))

        monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", stand_in)
    return request.param


@by_id
def test_exactly_the_oracle(case: Case, operator: str) -> None:
    """In float64 with exact angles: one key too many or too few would show by inverse."""
    batch = make_batch(case)
    output = batch.run_paged(torch.float64, batch.exact_inverse_rotations())
    assert output.dtype == torch.float64
    assert_close(output, batch.run_oracle(), EXACT)


@by_id
def test_with_rotation_tables(case: Case) -> None:
    """In float64, but for the float32 cosines of the tables that are used in production."""
    batch = make_batch(case)
    output = batch.run_paged(torch.float64, batch.inverse_rotations())
    assert_close(output, batch.run_oracle(), EXACT + batch.table_error())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@by_id
def test_low_precision(case: Case, dtype: torch.dtype, operator: str) -> None:
    """Three times what the oracle itself loses when it computes the same batch in this dtype,
    cosines included: the kernel rounds once more where it joins its branches."""
    batch = make_batch(case)
    exact = batch.run_oracle()
    loss = (batch.run_oracle(dtype).double() - exact).abs().max().item()
    output = batch.run_paged(dtype, batch.inverse_rotations())
    assert output.dtype == dtype
    assert_close(output, exact, 3 * loss)


@pytest.mark.parametrize("case", FAR_CASES, ids=lambda case: case.id)
def test_far_positions(case: Case, operator: str) -> None:
    """Around a million, where only the blocks of the prefix and of the window exist. The literal
    definition turns by distances alone, so it is exact at any position."""
    batch = make_batch(case)
    expected = batch.run_literal()
    assert_close(
        batch.run_paged(torch.float64, batch.exact_inverse_rotations()), expected, FAR_EXACT
    )
    assert_close(
        batch.run_paged(torch.float64, batch.inverse_rotations()),
        expected,
        FAR_EXACT + batch.table_error(),
    )


@pytest.mark.parametrize("case", VERY_FAR_CASES, ids=lambda case: case.id)
def test_positions_up_to_the_last(case: Case) -> None:
    """Up to 2**31 - 1, where float64 itself knows an angle to no more than 2**-22 rad.

    With the tables' float32 cosines, two rotations of a pair are off by 4e-7 rad each at the most,
    and the pairs of a head in all directions: a score of size 1 stays good to some 1e-6.
    """
    batch = make_batch(case)
    assert_close(
        batch.run_paged(torch.float64, batch.inverse_rotations()), batch.run_literal(), 1e-6
    )


@pytest.mark.parametrize(
    ("pattern", "block_size"),
    [
        ((10, 48, 48), 16),
        ((16, 48, 64), 16),
        ((0, 16, 16), 16),
        ((17, 5, 5), 16),
        ((33, 20, 37), 16),
        ((3, 1, 2), 4),
    ],
    ids=str,
)
def test_every_boundary(pattern: tuple[int, int, int], block_size: int) -> None:
    """Every length up to well past the window, the prefix and a few blocks: as the length before
    a decode step, as that before a chunk of one block and one token, and as a whole prompt."""
    lengths = range(2 * (pattern[0] + pattern[2]) + 2 * block_size + 2)
    requests = [(n, 1) for n in lengths]
    requests += [(n, block_size + 1) for n in lengths]
    requests += [(0, n) for n in lengths[1:]]
    small = {"heads": (2, 1), "head_size": 16}
    case = Case("all", tuple(requests), block_size=block_size, pattern=pattern, **small)
    batch = make_batch(case)
    assert_close(
        batch.run_paged(torch.float64, batch.exact_inverse_rotations()), batch.run_oracle(), EXACT
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_local = draw(st.integers(1, 80))
    limit = n_local + draw(st.sampled_from([0, 0, 1, 13, 200]))
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_size = draw(st.sampled_from([8, 16, 40]))
    requests = draw(
        st.lists(st.tuples(st.integers(0, 250), st.integers(1, 150)), min_size=1, max_size=4)
    )
    return Case(
        "random",
        tuple(requests),
        heads=(num_kv_heads * group, num_kv_heads),
        head_size=head_size,
        block_size=draw(st.integers(1, 40)),
        pattern=(draw(st.integers(0, 60)), n_local, limit),
        rotary_dim=draw(st.sampled_from([0, 4, 8, head_size])),
        is_neox_style=draw(st.booleans()),
    )


@given(case=cases(), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_batches(case: Case, seed: int) -> None:
    batch = make_batch(case, seed)
    assert_close(
        batch.run_paged(torch.float64, batch.exact_inverse_rotations()), batch.run_oracle(), EXACT
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_eager_attention_is_the_fused_operator(dtype: torch.dtype, masked: bool) -> None:
    """Output and log-sum-exp, the second in float32 or wider."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 3, rows, 32, generator=generator, dtype=torch.float64)
        for rows in (40, 70, 70)
    )
    mask = None
    if masked:
        hidden = torch.rand(40, 70, generator=generator) < 0.5
        hidden[:, 5] = False
        mask = torch.zeros(40, 70, dtype=dtype).masked_fill(hidden, -torch.inf)
    arguments = [x.to(dtype) for x in (query, key, value)]
    out, lse = _eager_attention(*arguments, mask, ScoreRules(0.2))
    fused_out, fused_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *arguments, 0.0, False, attn_mask=mask, scale=0.2
    )
    assert out.dtype == fused_out.dtype == dtype
    assert lse.dtype == fused_lse.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 16 * torch.finfo(dtype).eps
    assert_close(out, fused_out, tolerance)
    # The log-sum-exp of scores of size 1 is of size 4; the fused operator keeps it in float32.
    assert_close(lse, fused_lse, 4 * tolerance)


@pytest.mark.parametrize("name", ["fused", "eager"])
def test_scores_beyond_float16_do_not_overflow(name: str) -> None:
    """A product of a query and a key may exceed 65504, as those of models with large key biases
    do; scaled, and taken relative to the largest, it is a number like any other."""
    generator = torch.Generator().manual_seed(0)
    query = torch.full((1, 1, 5, 64), 40.0, dtype=torch.float16)
    key = (query[:, :, :1] + torch.zeros(1, 1, 9, 64)).to(torch.float16)
    key[..., 0] += torch.arange(9) / 32
    value = torch.randn(1, 1, 9, 64, generator=generator).to(torch.float16)
    if name == "eager":
        out, lse = _eager_attention(query, key, value, None, ScoreRules(0.125))
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, scale=0.125
        )
    scores = query.double() @ key.double().transpose(-1, -2)
    assert scores.min() > torch.finfo(torch.float16).max
    scores = scores * 0.125
    expected = scores.softmax(dim=-1) @ value.double()
    assert_close(out, expected, 16 * torch.finfo(torch.float16).eps)
    assert_close(lse, scores.logsumexp(dim=-1), 12800 * 4 * torch.finfo(torch.float32).eps)


class TestOnlyItsOwnRows:
    """What is written, and what is not."""

    @pytest.fixture
    def batch(self) -> Batch:
        return make_batch(Case("mixed", ((70, 1), (20, 9), (0, 5))))

    def test_padding_rows_stay_untouched(self, batch: Batch) -> None:
        expected = batch.run_paged(torch.float32, batch.inverse_rotations())
        padding = torch.full((4, *expected.shape[1:]), torch.nan)
        query = torch.cat((batch.query(torch.float32), padding))
        output = torch.full_like(query, -7.0)
        batch.attend(query, batch.inverse_rotations(), output)
        assert torch.equal(output[:-4], expected)
        assert (output[-4:] == -7.0).all()

    def test_the_query_stays_as_it_is(self, batch: Batch) -> None:
        query = batch.query(torch.float32)
        before = query.clone()
        batch.attend(query, batch.inverse_rotations(), torch.empty_like(query))
        assert torch.equal(query, before)

    def test_a_request_without_queries_is_skipped(self, batch: Batch) -> None:
        """As vLLM pads a batch of requests: no rows, and a length of 0."""
        expected = batch.run_paged(torch.float32, batch.inverse_rotations())
        query, output = batch.query(torch.float32), torch.full_like(expected, torch.nan)
        told = batch.device_batch()
        padded = DeviceBatch(
            torch.cat((told.query_start_loc, told.query_start_loc[-1:])),
            torch.cat((told.seq_lens, torch.zeros_like(told.seq_lens[:1]))),
            torch.cat((told.block_table, torch.zeros_like(told.block_table[:1]))),
            told.max_query_len,
        )
        kernel = ReferenceKernel(batch.layer(torch.float32))
        kernel.attend(query, joint_cache(batch.kv_cache(torch.float32)), padded, output)
        assert torch.equal(output, expected)

    def test_requests_do_not_mix(self, batch: Batch) -> None:
        """A batch gives what its requests give one by one."""
        together = batch.run_paged(torch.float64, batch.exact_inverse_rotations())
        offsets = batch.query_start_loc
        for row, (start, end) in enumerate(itertools.pairwise(offsets)):
            alone = Batch(
                batch.pattern,
                batch.rotary,
                batch.scale,
                batch.block_size,
                batch.num_blocks,
                batch.block_table[row : row + 1],
                batch.stretches[row : row + 1],
            )
            output = alone.run_paged(torch.float64, alone.exact_inverse_rotations())
            torch.testing.assert_close(together[start:end], output, rtol=0, atol=EXACT)


@pytest.mark.parametrize("split", [1, 16, 33, 64, 100])
def test_a_prompt_in_chunks_is_the_prompt_at_once(split: int) -> None:
    whole = make_batch(Case("prefill", ((0, 160),)))
    expected = whole.run_paged(torch.float64, whole.exact_inverse_rotations())
    (stretch,) = whole.stretches
    for start in range(0, 160, split):
        end = min(start + split, 160)
        chunk = make_batch(Case("chunked", ((start, end - start),)))
        (part,) = chunk.stretches
        part.query = stretch.query[start:end]
        part.key = stretch.key[part.key_positions]
        part.value = stretch.value[part.key_positions]
        output = chunk.run_paged(torch.float64, chunk.exact_inverse_rotations())
        assert_close(output, expected[start:end], EXACT)


class TestFarRotations:
    def test_only_queries_past_the_limit_are_turned(self) -> None:
        batch = make_batch(Case("prefill", ((0, 60),), pattern=(3, 20, 30)))
        inverse = batch.inverse_rotations()
        assert inverse is not None
        positions = batch.positions
        unturned = positions <= 30
        assert (inverse.query_cos[unturned] == 1).all()
        assert (inverse.query_sin[unturned] == 0).all()
        assert (inverse.query_sin[~unturned, 0] != 0).all()
        tables = RotationTables(make_rotary(64).inv_freq)
        cos, sin = tables(positions[~unturned] - 30)
        assert torch.equal(inverse.query_cos[~unturned], cos)
        assert torch.equal(inverse.query_sin[~unturned], -sin)

    @pytest.mark.parametrize("n_global", [10**6, 2**31 - 1])
    def test_costs_what_is_there(self, n_global: int) -> None:
        """Global keys that no request has yet are not made rotations for."""
        tables = RotationTables(10000.0 ** -(torch.arange(0, 8, 2) / 8))
        pattern = LambdaPattern(n_global, 4, 6)
        for last in (2, 3, 4, 40, 41):
            inverse = inverse_rotations(tables, True, torch.tensor([0, last]), pattern)
            assert len(inverse.key_cos) == len(inverse.key_sin) == max(0, last - 3)
        assert sum(each.shape[0] for each in tables._leading or ()) <= 2 * 64

    def test_global_keys_are_turned_back_to_zero(self) -> None:
        batch = make_batch(Case("prefill", ((0, 60),), pattern=(3, 20, 30)))
        inverse = batch.inverse_rotations()
        assert inverse is not None
        cos, sin = RotationTables(make_rotary(64).inv_freq)(torch.arange(3))
        assert torch.equal(inverse.key_cos, cos)
        assert torch.equal(inverse.key_sin, -sin)


def write_cache(
    key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Writes to a cache as vLLM has it."""
    heads = Heads(2, 2, key.shape[2], key.dtype)
    kernel = ReferenceKernel(make_layer(heads, LambdaPattern(0, 1, 1)))
    kernel.write_cache(key, value, joint_cache(cache), slots)


def split_cache(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The views by which it is read and written."""
    halves = joint_cache(cache)
    return halves.key, halves.value


class TestWriteCache:
    """Slots are written, and nothing else is."""

    @pytest.fixture
    def cache(self) -> torch.Tensor:
        return torch.full((6, 2, 4, 2 * 8), torch.nan)

    def tokens(self, count: int, dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(count)
        for _ in ("key", "value"):
            yield torch.randn(count, 2, 8, generator=generator).to(dtype)

    def test_layout(self, cache: torch.Tensor) -> None:
        """A head of a block holds its keys one after the other, then its values."""
        key, value = self.tokens(1)
        write_cache(key, value, cache, torch.tensor([3 * 4 + 2]))
        flat = cache.view(6, 2, 2 * 4 * 8)
        assert torch.equal(flat[3, :, 2 * 8 : 3 * 8], key[0])
        assert torch.equal(flat[3, :, (4 + 2) * 8 : (4 + 3) * 8], value[0])
        assert cache.isnan().sum() == cache.numel() - 2 * 2 * 8

    def test_split_cache_gives_views_of_the_halves(self, cache: torch.Tensor) -> None:
        keys, values = split_cache(cache)
        assert keys.shape == values.shape == (6, 2, 4, 8)
        keys.fill_(1)
        values.fill_(2)
        flat = cache.view(6, 2, 2, 4 * 8)
        assert (flat[:, :, 0] == 1).all()
        assert (flat[:, :, 1] == 2).all()

    def test_slots_in_any_order(self, cache: torch.Tensor) -> None:
        slots = [21, 4, 7, 8, 0]
        key, value = self.tokens(5)
        write_cache(key, value, cache, torch.tensor(slots))
        keys, values = split_cache(cache)
        for token, slot in enumerate(slots):
            assert torch.equal(keys[slot // 4, :, slot % 4], key[token])
            assert torch.equal(values[slot // 4, :, slot % 4], value[token])
        assert (~cache.isnan()).sum() == 5 * 2 * 2 * 8

    @pytest.mark.parametrize("slots", [[21, 4], [], [-1, 4, -1], [-1]], ids=str)
    def test_padding_and_tokens_without_a_slot(self, cache: torch.Tensor, slots: list[int]) -> None:
        key, value = self.tokens(5)
        write_cache(key, value, cache, torch.tensor(slots, dtype=torch.int64))
        keys, values = split_cache(cache)
        for token, slot in enumerate(slots):
            if slot >= 0:
                assert torch.equal(keys[slot // 4, :, slot % 4], key[token])
                assert torch.equal(values[slot // 4, :, slot % 4], value[token])
        written = sum(slot >= 0 for slot in slots)
        assert (~cache.isnan()).sum() == written * 2 * 2 * 8

    def test_rounds_to_the_dtype_of_the_cache(self, cache: torch.Tensor) -> None:
        cache = cache.to(torch.bfloat16)
        key, value = self.tokens(3)
        write_cache(key, value, cache, torch.tensor([1, 2, 3]))
        keys, _ = split_cache(cache)
        assert torch.equal(keys[0, :, 1:4].transpose(0, 1), key.to(torch.bfloat16))

    def test_what_is_written_is_what_is_attended_to(self) -> None:
        """The layout of the tests' own batches is the one that is written."""
        batch = make_batch(Case("prefill", ((0, 40),), pattern=(10, 48, 48)))
        (stretch,) = batch.stretches
        expected = batch.kv_cache(torch.float64)
        cache = torch.full_like(expected, torch.nan)
        where = torch.tensor(stretch.key_positions)
        slots = batch.block_table[0, where // 16].long() * 16 + where % 16
        key = batch._turn(stretch.key, stretch.key_positions)
        write_cache(key, stretch.value, cache, slots)
        assert torch.equal(cache.nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "extra",
    ["alibi", "softcap", "sinks", "alibi softcap sinks"],
    ids=lambda extra: extra.replace(" ", "-"),
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "pattern"),
    [(4, 2, (5, 70, 70)), (3, 3, (0, 64, 64)), (6, 1, (20, 33, 50))],
    ids=str,
)
def test_other_scores(
    dtype: torch.dtype, extra: str, heads: int, kv_heads: int, pattern: tuple[int, int, int]
) -> None:
    """ALiBi in place of RoPE, soft-capping, learned sinks: prefill in two pieces, then decode."""
    generator = torch.Generator().manual_seed(3)
    length, block_size = 300, 16
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    query = draw(length, heads, 32)
    key, value = draw(2, length, kv_heads, 32)
    slopes = 2.0 ** -torch.arange(1, heads + 1) if "alibi" in extra else None
    softcap = 2.0 if "softcap" in extra else None
    sinks = draw(heads) if "sinks" in extra else None
    expected = oracle.lambda_attention(
        query, key, value, LambdaPattern(*pattern), scale=0.3,
        alibi_slopes=slopes, softcap=softcap, sinks=sinks,
    )  # fmt: skip

    num_blocks = cdiv(length, block_size)
    table = 1 + torch.randperm(num_blocks, generator=generator)[None].int()
    cache = torch.full((1 + num_blocks, kv_heads, block_size, 64), torch.nan, dtype=dtype)
    positions = torch.arange(length)
    slots = table[0, positions // block_size].long() * block_size + positions % block_size
    output = torch.full((length, heads, 32), torch.nan, dtype=dtype)
    rules = ScoreRules(0.3, softcap, slopes, sinks)
    layer = make_layer(Heads(heads, kv_heads, 32, dtype), LambdaPattern(*pattern), rules)
    kernel, halves = ReferenceKernel(layer), joint_cache(cache)
    for start, end in [(0, 130), (130, 297), (297, 298), (298, 299), (299, 300)]:
        rows = slice(start, end)
        kernel.write_cache(key[rows].to(dtype), value[rows].to(dtype), halves, slots[rows])
        batch = int32_batch([0, end - start], [end], table.tolist())
        kernel.attend(query[rows].to(dtype), halves, batch, output[rows])
    # Scores are of size 10 at the most, and some ten roundings of that size meet in an output.
    assert_close(output, expected, 200 * torch.finfo(dtype).eps)
