"""Λ-attention through xformers' own split-KV and merging kernels, interpreted, against the oracle.

Keys that were copied together are attended by FlashAttention, which a CPU lacks: `Packed` stands
in for it.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from xformers.ops import fmha
from xformers.ops.fmha.common import Context

from tests.kernels.batches import Batch, Case, make_batch
from tests.kernels.cases import assert_close
from tests.kernels.triton.cases import exact_and_tolerance
from tests.kernels.triton.interpreted import block_pointers
from tests.kernels.xformers_batches import by_id, far_by_id, make_layer, near, run
from vllm_lminf.kernels.base import DeviceBatch, PagedCache, ScoreRules
from vllm_lminf.kernels.xformers_plan import Operators, make_plan

DTYPE = torch.float16


class Paged(fmha.triton_splitk.FwOp):
    """The split-KV operator, said to run on CPUs, with its own sizes for all of them."""

    SUPPORTED_DEVICES: ClassVar = {"cpu"}

    @classmethod
    def get_extra_args(cls, **_: Any) -> dict[str, int]:
        return {"BLOCK_M": cls.BLOCK_M, "BLOCK_N": cls.BLOCK_N, "num_warps": 1, "num_stages": 1}


class Packed(fmha.flash.FwOp):
    """Stands in for FlashAttention: attends what a bias's materialised mask lets through."""

    SUPPORTED_DEVICES: ClassVar = {"cpu"}
    OPERATOR = True

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, Context]:
        query, key, value = (x[0].float() for x in (inp.query, inp.key, inp.value))
        hidden = inp.attn_bias.materialize((query.shape[0], key.shape[0])) == -math.inf
        scores = torch.einsum("mghd,nghd->ghmn", query, key) * inp.scale
        scores = scores.masked_fill(hidden, -math.inf)
        # What nobody sees may be anything: a weight of zero doesn't hide NaN.
        value = value.masked_fill(hidden.all(0)[:, None, None, None], 0)
        result = torch.einsum("ghmn,nghd->mghd", scores.softmax(-1), value)[None].to(DTYPE)
        return result, Context(lse=scores.logsumexp(-1)[None], out=result)


OPERATORS = Operators(Paged, Packed)


@pytest.fixture(autouse=True, scope="module")
def operators_on_cpu() -> Iterator[None]:
    merge = fmha.triton_splitk.merge_attentions_varargs
    merge.register_kernel("cpu")(merge._init_fn)
    with pytest.MonkeyPatch.context() as patch:
        block_pointers.bring_back(patch)
        yield


def attend(batch: Batch, rules: ScoreRules | None = None, **kwargs: Any) -> torch.Tensor:
    return run(batch, DTYPE, make_layer(batch, DTYPE, rules, OPERATORS), **kwargs)


@by_id
def test_the_oracle(case: Case) -> None:
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, DTYPE)
    output = attend(batch)
    assert output.dtype == DTYPE
    assert_close(output, exact, tolerance)


@far_by_id
def test_far_positions(case: Case) -> None:
    """Up to 2**31 - 1."""
    _, tolerance = exact_and_tolerance(make_batch(near(case)), DTYPE)
    batch = make_batch(case)
    assert_close(attend(batch), batch.run_literal(), tolerance)


@pytest.mark.parametrize("pattern", [(20, 37, 90), (0, 300, 300)], ids=str)
def test_sinks(pattern: tuple[int, int, int]) -> None:
    case = Case("sinks", ((150, 1), (99, 9)), pattern=pattern, head_size=16)
    batch = make_batch(case)
    rules = ScoreRules(batch.scale)
    rules.sinks = torch.tensor([2.0, -30.0, 0.0, 5.0, -torch.inf, 40.0])
    exact, tolerance = exact_and_tolerance(batch, DTYPE, rules)
    assert_close(attend(batch, rules), exact, tolerance)


class TestRowsAndStrides:
    """What lies where, what is written, and what is not."""

    @pytest.fixture(params=["few", "many"])
    def batch(self, request: pytest.FixtureRequest) -> Batch:
        """A batch whose queries are all sequences of their own, and one where not all are."""
        requests = {"few": ((120, 1), (20, 2)), "many": ((120, 1), (20, 9))}[request.param]
        return make_batch(Case(request.param, requests, heads=(4, 2), head_size=16))

    def test_memory_orders_of_the_cache(self, batch: Batch) -> None:
        expected = attend(batch)
        cache = batch.empty_cache(DTYPE)
        blocks, heads, tokens, dims = cache.key.shape
        storage = torch.full((blocks * heads * tokens * 2 * dims,), torch.nan, dtype=DTYPE)
        orders = {
            "tokens, heads": batch.empty_cache(DTYPE, heads_first=False),
            "heads, half, tokens": _halves(storage.view(blocks, heads, 2, tokens, dims), 2, (0, 1)),
            "half, tokens, heads": _halves(storage.view(blocks, 2, tokens, heads, dims), 1, (0, 2)),
            "tokens, heads, half": _halves(storage.view(blocks, tokens, heads, 2, dims), 3, (0, 2)),
            "heads, tokens, half": _halves(storage.view(blocks, heads, tokens, 2, dims), 3, (0, 1)),
        }
        for name, order in orders.items():
            storage.fill_(torch.nan)
            assert order.key.shape == cache.key.shape, name
            assert torch.equal(attend(batch, cache=order), expected), name

    def test_rows_that_lie_apart_and_padding(self, batch: Batch) -> None:
        """Queries are slices of a wider projection; rows past the batch get zeros."""
        expected = attend(batch)
        layer = make_layer(batch, DTYPE, None, OPERATORS)
        cache = batch.empty_cache(DTYPE)
        run(batch, DTYPE, layer, cache=cache)
        num_tokens, num_heads, head_size = expected.shape
        rows = torch.full((num_tokens + 3, 2 * num_heads, head_size), 7.0, dtype=DTYPE)
        rows[:num_tokens, :num_heads] = batch.query(DTYPE)
        outputs = torch.full((num_tokens + 3, num_heads + 1, 2 * head_size), -7.0, dtype=DTYPE)
        output = outputs[:, 1:, :head_size]
        layer.attend(rows[:, :num_heads], cache, batch.device_batch(), output)
        assert torch.equal(output[:num_tokens], expected)
        assert (output[num_tokens:] == 0).all()
        output.fill_(-7.0)
        assert (outputs == -7.0).all()

    @pytest.mark.parametrize("stale", [2**31 - 1])
    def test_padding_requests(self, batch: Batch, stale: int) -> None:
        """No rows, and whatever length was left behind; their blocks are never looked up, and
        neither are the entries past a request's end."""
        expected = attend(batch)
        told = batch.device_batch()
        table = told.block_table.clone()
        for row, seq_len in enumerate(batch.seq_lens):
            table[row, (seq_len - 1) // batch.block_size + 1 :] = 2**30
        padded = DeviceBatch(
            torch.cat((told.query_start_loc, told.query_start_loc[-1:].expand(3))),
            torch.cat((told.seq_lens, torch.full((3,), stale, dtype=torch.int32))),
            torch.cat((table, torch.full_like(table[:1], 2**30).expand(3, -1))),
            told.max_query_len,
        )
        assert torch.equal(attend(batch, told=padded), expected)

    def test_nothing_to_do(self, batch: Batch) -> None:
        layer = make_layer(batch, DTYPE, None, OPERATORS)
        cache, told = batch.empty_cache(DTYPE), batch.device_batch()
        query = batch.query(DTYPE)
        layer.attend(query[:0], cache, told, query[:0])
        none = DeviceBatch(told.query_start_loc[:1], told.seq_lens[:0], told.block_table[:0], 0)
        output = torch.full_like(query, -7.0)
        layer.attend(query, cache, none, output)
        assert (output == -7.0).all()


def _halves(both: torch.Tensor, half: int, heads: tuple[int, int]) -> PagedCache:
    """Keys and values [blocks, heads, tokens, dims] of one tensor.

    Args:
        both: in some memory order.
        half: its dimension of 2: keys, then values.
        heads: where blocks and heads are among the others.
    """
    key, value = (x.movedim(heads, (0, 1)) for x in both.unbind(half))
    return PagedCache(key, value)


def test_lengths_on_the_host() -> None:
    """They are used where they are known, instead of what lies on the device."""
    batch = make_batch(Case("mixed", ((120, 1), (20, 9), (70, 2)), heads=(2, 1), head_size=16))
    told = batch.device_batch()
    known = dataclasses.replace(
        told, query_start_loc_cpu=told.query_start_loc, seq_lens_cpu=told.seq_lens
    )
    assert torch.equal(attend(batch, told=known), attend(batch))


def test_layers_share_a_batch_plan() -> None:
    """Those that are alike use one; another pattern has its own."""
    case = Case("decode", ((120, 1), (20, 1)), heads=(2, 1), head_size=16)
    batch, other = make_batch(case), make_batch(dataclasses.replace(case, pattern=(10, 30, 30)))
    told = batch.device_batch()
    layer = make_layer(batch, DTYPE, None, OPERATORS)
    first = run(batch, DTYPE, layer, told=told)
    assert torch.equal(run(batch, DTYPE, layer, told=told), first)
    assert len(told.shared) == 1
    narrower = make_layer(other, DTYPE, None, OPERATORS)
    expected = run(batch, DTYPE, narrower, told=batch.device_batch())
    assert torch.equal(run(batch, DTYPE, narrower, told=told), expected)
    assert len(told.shared) == 2
    assert not torch.equal(expected, first)


def test_decoding_asks_the_device_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would wait for a device, or read its memory on the host, isn't called."""
    batch = make_batch(Case("drafts", ((120, 8), (20, 1)), heads=(2, 1), head_size=16))
    told = batch.device_batch()

    def forbidden(*_: object) -> None:
        raise AssertionError("this waits for the device")

    rotation = make_layer(batch, DTYPE, None, OPERATORS)._rotation
    rotation.tables.leading(16)  # Computed once.
    for name in ("tolist", "item", "cpu", "__bool__", "__int__", "nonzero", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    parts = make_plan(told, 9, batch.pattern, rotation, 1, 16, 1, OPERATORS)
    assert [part.rows for part in parts] == [None, None]
