"""The compiled CPU kernels against the oracle, on a cache that holds NaN wherever nobody wrote."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.batches import Batch, Case, make_batch, make_rotary
from tests.kernels.cases import CASES, FAR_CASES, VERY_FAR_CASES, assert_close
from tests.kernels.layers import int32_batch, joint_cache, make_layer
from vllm_lminf.kernels import oracle
from vllm_lminf.kernels.base import DeviceBatch, Heads, LayerConfig, PagedCache, ScoreRules
from vllm_lminf.kernels.cpu.kernel import CpuBatch, CpuKernel, CpuRotation
from vllm_lminf.pattern import LambdaPattern, cdiv
from vllm_lminf.rope import RotationTables, rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SERVED = [
    dataclasses.replace(case, block_size=16 * cdiv(case.block_size, 16))
    for case in CASES
    if case.head_size % 16 == 0
]
WINDOWS_OF_STEPS = [
    # Decoding over windows of several parts, and chunks over windows of several steps of 256 keys.
    Case(
        "decode", tuple((n, 1) for n in (255, 256, 511, 512, 513, 1500)), pattern=(10, 1024, 1024)
    ),
    Case("decode", ((1500, 8), (1499, 9), (3, 8)), block_size=128, pattern=(33, 700, 900)),
    Case("decode", ((3000, 1),), heads=(32, 2), pattern=(300, 1100, 1100)),
    Case("chunked", ((900, 300),), heads=(9, 3), block_size=64, pattern=(100, 600, 650)),
    Case("mixed", ((1200, 1), (800, 130), (0, 270)), heads=(7, 1), pattern=(20, 513, 513)),
]


def layer_of(
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    pattern: LambdaPattern = LambdaPattern(0, 4, 4),  # noqa: B008
) -> LayerConfig:
    """A layer that rotates nothing."""
    return make_layer(Heads(num_heads, num_kv_heads, head_size, dtype), pattern, ScoreRules(0.2))


def exact_and_tolerance(batch: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """The result in float64, and three times what the oracle itself loses in this dtype."""
    exact = batch.run_oracle()
    return exact, 3 * (batch.run_oracle(dtype).double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SERVED + WINDOWS_OF_STEPS, ids=lambda case: case.id)
def test_the_oracle(case: Case, dtype: torch.dtype) -> None:
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, dtype)
    output = batch.run_cpu(dtype, batch.inverse_rotations(), ScoreRules(batch.scale))
    assert output.dtype == dtype
    assert_close(output, exact, tolerance)


@pytest.mark.parametrize("case", [*FAR_CASES, *VERY_FAR_CASES], ids=lambda case: case.id)
def test_far_positions(case: Case) -> None:
    """Up to 2**31 - 1. Inputs are rounded to float32 once, sums of up to 80 terms of size 1 are
    formed in it, and two rotations of a far pair are off by 4e-7 rad each at the most."""
    batch = make_batch(case)
    output = batch.run_cpu(torch.float32, batch.inverse_rotations(), ScoreRules(batch.scale))
    assert_close(output, batch.run_literal(), 3e-6)


class Stretch:
    """One sequence whose keys are all in the cache, with whatever rules."""

    def __init__(self, length: int, heads: tuple[int, int], head_size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(num_heads: int) -> torch.Tensor:
            shape = (length, num_heads, head_size)
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.query, self.key, self.value = draw(heads[0]), draw(heads[1]), draw(heads[1])
        self.rotary = make_rotary(head_size)

    def exact(self, pattern: LambdaPattern, dtype: torch.dtype, **rules: object) -> torch.Tensor:
        query, key, value = (x.to(dtype) for x in (self.query, self.key, self.value))
        return oracle.lambda_attention(query, key, value, pattern, **rules)  # type: ignore[arg-type]

    def run(
        self,
        pattern: LambdaPattern,
        dtype: torch.dtype,
        rules: ScoreRules,
        rotates: bool,
        starts: tuple[int, ...] = (0,),
    ) -> torch.Tensor:
        """The sequence in chunks that begin at ``starts``, in blocks of 32."""
        length, num_heads, head_size = self.query.shape
        num_kv_heads = self.key.shape[1]
        positions = torch.arange(length)
        angles = positions[:, None] * self.rotary.inv_freq
        query, key = self.query, self.key
        if rotates:
            query, key = (rotate(x, angles.cos(), angles.sin(), True) for x in (query, key))
        query, key, value = (x.to(dtype) for x in (query, key, self.value))
        heads = Heads(num_heads, num_kv_heads, head_size, dtype)
        rotary = self.rotary if rotates else None
        kernel = CpuKernel(make_layer(heads, pattern, rules, rotary=rotary))
        num_blocks = cdiv(length, 32)
        cache = torch.full((1 + num_blocks, num_kv_heads, 32, 2 * head_size), torch.nan).to(dtype)
        table = 1 + torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
        slots = table[positions // 32] * 32 + positions % 32
        halves = joint_cache(cache)
        output = torch.full_like(query, torch.nan)
        for start, end in itertools.pairwise([*starts, length]):
            rows = slice(start, end)
            kernel.write_cache(key[rows], value[rows], halves, slots[rows])
            batch = int32_batch([0, end - start], [end], [table.tolist()])
            kernel.attend(query[rows], halves, batch, output[rows])
        return output


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", ["alibi", "softcap", "sinks", "softcap+sinks", "alibi+sinks"])
@pytest.mark.parametrize("pattern", [(10, 48, 48), (20, 37, 90), (0, 300, 300)], ids=str)
def test_rules(names: str, pattern: tuple[int, int, int], dtype: torch.dtype) -> None:
    stretch, lam = Stretch(400, (6, 2), 32), LambdaPattern(*pattern)
    rules = ScoreRules(0.2)
    if "alibi" in names:
        rules.alibi_slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03, 0.01])
    if "softcap" in names:
        rules.softcap = 1.5
    if "sinks" in names:
        rules.sinks = torch.tensor([2.0, -30.0, 0.0, 5.0, 1.0, 40.0])
    arguments = dict(vars(rules))
    rotates = rules.alibi_slopes is None
    if rotates:
        arguments["rotary"] = stretch.rotary
    exact = stretch.exact(lam, torch.float64, **arguments)
    loss = (stretch.exact(lam, dtype, **arguments).double() - exact).abs().max().item()
    output = stretch.run(lam, dtype, rules, rotates, starts=(0, 64, 250, 399))
    assert_close(output, exact, 3 * loss)


class TestSameToTheBit:
    """Whatever a query is computed beside: other requests, other chunks, other threads."""

    @pytest.fixture(params=DTYPES, ids=str)
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        return request.param

    def test_alone_and_in_a_batch(self, dtype: torch.dtype) -> None:
        batch = make_batch(
            Case("mixed", ((700, 1), (90, 40), (0, 5), (1999, 1)), pattern=(10, 600, 600))
        )
        together = batch.run_cpu(dtype, batch.inverse_rotations(), ScoreRules(batch.scale))
        for row, (start, end) in enumerate(itertools.pairwise(batch.query_start_loc)):
            alone = dataclasses.replace(
                batch,
                block_table=batch.block_table[row : row + 1],
                stretches=batch.stretches[row : row + 1],
            )
            output = alone.run_cpu(dtype, alone.inverse_rotations(), ScoreRules(batch.scale))
            assert torch.equal(output, together[start:end])

    def test_at_once_and_in_chunks(self, dtype: torch.dtype) -> None:
        stretch, pattern = Stretch(1500, (6, 2), 64), LambdaPattern(20, 600, 700)
        rules = ScoreRules(0.125)
        expected = stretch.run(pattern, dtype, rules, rotates=True)
        for starts in [(0, 500, 1000), (0, 33, 47, 1099), (0, 1491)]:
            output = stretch.run(pattern, dtype, rules, True, starts)
            assert torch.equal(output, expected)

    def test_any_number_of_threads(self, dtype: torch.dtype) -> None:
        batch = make_batch(WINDOWS_OF_STEPS[1])
        before = torch.get_num_threads()
        outputs = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                outputs.append(
                    batch.run_cpu(dtype, batch.inverse_rotations(), ScoreRules(batch.scale))
                )
        finally:
            torch.set_num_threads(before)
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_local = draw(st.integers(1, 700))
    limit = n_local + draw(st.sampled_from([0, 0, 1, 13, 200]))
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    head_size = 16 * draw(st.integers(1, 5))
    requests = draw(
        st.lists(st.tuples(st.integers(0, 900), st.integers(1, 150)), min_size=1, max_size=4)
    )
    return Case(
        "random",
        tuple(requests),
        heads=(num_kv_heads * group, num_kv_heads),
        head_size=head_size,
        block_size=16 * draw(st.integers(1, 9)),
        pattern=(draw(st.integers(0, 60)), n_local, limit),
        rotary_dim=draw(st.sampled_from([0, 4, 8, head_size])),
        is_neox_style=draw(st.booleans()),
    )


@given(case=cases(), seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_batches(case: Case, seed: int, dtype: torch.dtype) -> None:
    """A fixed tolerance: of few queries, the oracle may lose next to nothing by chance. Scores of
    size 1 are off by some units in the last place, and so are weights and values."""
    batch = make_batch(case, seed)
    output = batch.run_cpu(dtype, batch.inverse_rotations(), ScoreRules(batch.scale))
    assert_close(output, batch.run_oracle(), 24 * torch.finfo(dtype).eps)


class TestRows:
    """What is read and written of the tensors that are handed over."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_heads_of_rows_that_lie_apart(self, dtype: torch.dtype) -> None:
        """As vLLM hands them over: parts of one tensor, at odd addresses."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(21, 1 + 4 * 32 + 2 * 32 + 2 * 32, generator=generator).to(dtype)[1:, 1:]
        query, key, value = (
            x.view(20, -1, 32) for x in rows.split([4 * 32, 2 * 32, 2 * 32], dim=1)
        )
        outputs = []
        for contiguous in (False, True):
            q, k, v = (x.contiguous() if contiguous else x for x in (query, key, value))
            kernel = CpuKernel(layer_of(4, 2, 32, dtype, LambdaPattern(0, 11, 11)))
            cache = joint_cache(torch.full((3, 2, 16, 64), torch.nan, dtype=dtype))
            kernel.write_cache(k, v, cache, torch.arange(16, 36))
            batch = int32_batch([0, 20], [20], [[1, 2]])
            wide = torch.full((20, 5, 32), -7.0, dtype=dtype)
            kernel.attend(q, cache, batch, wide[:, 1:])
            assert (wide[:, 0] == -7).all()
            outputs.append(wide[:, 1:])
        assert torch.equal(*outputs)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("slots", [[37, 16, 63, 90], [-1, 16, -1], [], [-1]], ids=str)
    def test_only_the_slots_are_written(self, dtype: torch.dtype, slots: list[int]) -> None:
        key, value = torch.ones(2, 5, 2, 32, dtype=dtype)
        cache = torch.full((6, 2, 16, 64), torch.nan, dtype=dtype)
        kernel = CpuKernel(layer_of(4, 2, 32, dtype))
        slot_mapping = torch.tensor(slots, dtype=torch.int64)
        kernel.write_cache(key, value, joint_cache(cache), slot_mapping)
        written = [slot for slot in slots if slot >= 0]
        assert (~cache.isnan()).sum() == len(written) * 2 * 2 * 32
        for block in {slot // 16 for slot in written}:
            assert (~cache[block].isnan()).any()

    def test_a_request_without_queries_is_skipped(self) -> None:
        """As vLLM pads a batch of requests: no rows, and a length of 0."""
        query, key, value = torch.randn(3, 20, 2, 32)
        kernel = CpuKernel(layer_of(2, 2, 32, torch.float32, LambdaPattern(3, 11, 11)))
        cache = joint_cache(torch.full((3, 2, 16, 64), torch.nan))
        kernel.write_cache(key, value, cache, torch.arange(16, 36))
        outputs = []
        for padding in (0, 2):
            batch = int32_batch(
                [0, 20] + [20] * padding, [20] + [0] * padding, [[1, 2]] + [[0, 0]] * padding
            )
            outputs.append(torch.full_like(query, torch.nan))
            kernel.attend(query, cache, batch, outputs[-1])
        assert outputs[0].isfinite().all()
        assert torch.equal(*outputs)


class TestRefusals:
    def test_what_is_served(self) -> None:
        for dtype in DTYPES:
            assert CpuKernel.unsupported_reasons(layer_of(4, 2, 80, dtype)) == []
        served = layer_of(4, 2, 64, torch.bfloat16)
        for refused in (
            layer_of(4, 2, 64, torch.float64),
            layer_of(4, 2, 72, torch.bfloat16),
            dataclasses.replace(served, block_size=24),
            dataclasses.replace(served, cache_dtype=torch.float16),
            dataclasses.replace(served, device=torch.device("cuda")),
        ):
            assert len(CpuKernel.unsupported_reasons(refused)) == 1

    @pytest.mark.parametrize("heads", [(4, 2, 72), (4, 3, 64)], ids=str)
    def test_other_heads(self, heads: tuple[int, int, int]) -> None:
        with pytest.raises(ValueError, match="multiples of 16"):
            CpuKernel(layer_of(*heads, torch.float32))

    def test_another_dtype_or_layout(self) -> None:
        layer = CpuKernel(layer_of(2, 2, 16, torch.float32))
        cache, slots = joint_cache(torch.zeros(2, 2, 16, 32)), torch.tensor([16])
        key = torch.zeros(1, 2, 16)
        with pytest.raises(ValueError, match="bfloat16"):
            layer.write_cache(key.bfloat16(), key, cache, slots)
        apart = torch.zeros(1, 2, 32)[:, :, ::2]
        with pytest.raises(ValueError, match="next to each other"):
            layer.write_cache(key, apart, cache, slots)

    def test_another_cache(self) -> None:
        kernel = CpuKernel(layer_of(2, 2, 16, torch.float32))
        key, slots = torch.zeros(1, 2, 16), torch.tensor([16])
        for blocks, dtype in ((24, torch.float32), (16, torch.float16)):
            cache = joint_cache(torch.zeros(2, 2, blocks, 32, dtype=dtype))
            with pytest.raises(ValueError, match=f"blocks of {blocks} in {dtype}"):
                kernel.write_cache(key, key, cache, slots)
        apart = PagedCache(*torch.zeros(2, 2, 2, 16, 16))
        with pytest.raises(ValueError, match="values follow its keys"):
            kernel.write_cache(key, key, apart, slots)

    def test_a_batch_that_does_not_fit_together(self) -> None:
        offsets = torch.tensor([0, 1], dtype=torch.int32)
        lens, table = offsets[1:], torch.zeros(1, 4, dtype=torch.int32)
        layer = layer_of(2, 2, 16, torch.float32)
        with pytest.raises(TypeError, match="int32"):
            CpuBatch(DeviceBatch(offsets.long(), lens, table, 1), layer)
        with pytest.raises(ValueError, match="requests"):
            CpuBatch(DeviceBatch(offsets, torch.cat((lens, lens)), table, 1), layer)


class TestRotation:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "gptj"])
    @pytest.mark.parametrize("rotary_dim", [64, 48, 40, 2], ids=str)
    @pytest.mark.parametrize("tokens", [1, 3, 700], ids=str)
    def test_is_the_rotation(
        self, dtype: torch.dtype, is_neox_style: bool, rotary_dim: int, tokens: int
    ) -> None:
        """In place, in parts of one tensor; what lies between the parts stays as it is."""
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(tokens, 3 + 5 * 64 + 7, generator=generator).to(dtype)
        before = whole.clone()
        positions = torch.randint(0, 2**31 - 1, (tokens,), generator=generator)
        cos, sin = RotationTables(make_rotary(rotary_dim).inv_freq)(positions)
        part = whole[:, 3 : 3 + 5 * 64]
        exact = rotate(part.double().view(tokens, 5, 64), cos, sin, is_neox_style)
        CpuRotation(torch.cat((cos, sin), dim=-1), 64, is_neox_style).rotate(part)
        tolerance = 4 * torch.finfo(dtype).eps
        assert_close(part.view(tokens, 5, 64), exact, tolerance)
        assert torch.equal(whole[:, :3], before[:, :3])
        assert torch.equal(whole[:, -7:], before[:, -7:])
        unturned = part.view(tokens, 5, 64)[..., rotary_dim:]
        assert torch.equal(unturned, before[:, 3:-7].view(tokens, 5, 64)[..., rotary_dim:])

    def test_heads_of_their_own_dimension(self) -> None:
        x = torch.randn(4, 3, 32)
        cos, sin = RotationTables(make_rotary(32).inv_freq)(torch.arange(4))
        expected = rotate(x, cos, sin, True)
        CpuRotation(torch.cat((cos, sin), dim=-1), 32, True).rotate(x)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_queries_and_keys_at_once(self, dtype: torch.dtype) -> None:
        """Parts of one tensor, and after them tensors of another layout."""
        cos, sin = RotationTables(make_rotary(32).inv_freq)(torch.arange(5))
        rotation = CpuRotation(torch.cat((cos, sin), dim=-1), 32, True)
        for whole in (torch.randn(5, 6 * 32), torch.randn(5, 9 * 32)):
            query, key = whole.to(dtype).split([whole.shape[1] - 64, 64], dim=1)
            exact = [rotate(x.double().view(5, -1, 32), cos, sin, True) for x in (query, key)]
            rotation.rotate(query, key.view(5, 2, 32))
            for turned, expected in zip((query, key), exact, strict=True):
                assert_close(turned.view(5, -1, 32), expected, 4 * torch.finfo(dtype).eps)

    def test_one_head_of_each_token(self) -> None:
        """It has no next one: whatever the stride to it is said to be."""
        cos, sin = RotationTables(make_rotary(32).inv_freq)(torch.arange(5))
        key = torch.randn(5, 96)[:, 40:72].unsqueeze(1).as_strided((5, 1, 32), (96, 96, 1), 40)
        exact = rotate(key.double(), cos, sin, True)
        CpuRotation(torch.cat((cos, sin), dim=-1), 32, True).rotate(key)
        assert_close(key, exact, 4 * torch.finfo(key.dtype).eps)

    def test_no_tokens(self) -> None:
        CpuRotation(torch.empty(0, 32), 32, True).rotate(torch.empty(0, 64), torch.empty(0, 32))

    def test_other_tensors_are_refused(self) -> None:
        cos_sin = torch.ones(4, 32)
        with pytest.raises(ValueError, match="fit"):
            CpuRotation(cos_sin, 32, True).rotate(torch.ones(3, 64))
        with pytest.raises(ValueError, match="fit"):
            CpuRotation(cos_sin, 32, True).rotate(torch.ones(4, 64), torch.ones(4, 64).half())
        with pytest.raises(ValueError, match="float32"):
            CpuRotation(cos_sin.double(), 32, True)
        with pytest.raises(ValueError, match="lie together"):
            CpuRotation(cos_sin, 32, True).rotate(torch.ones(4, 3, 64)[..., ::2])
