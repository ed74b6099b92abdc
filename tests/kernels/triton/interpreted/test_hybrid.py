"""Triton's kernels for a few queries and FlashAttention for more, in one batch."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.kernels.batches import Batch, Case, make_batch
from tests.kernels.flash_batches import by_id, run
from tests.kernels.test_reference import assert_close
from tests.kernels.triton.cases import PATTERNS, exact_and_tolerance, rules_of
from tests.kernels.triton.interpreted.test_flash import flash_attn_varlen_func
from vllm_lminf.kernels.base import ScoreRules
from vllm_lminf.kernels.hybrid import HybridKernel

DTYPE = torch.float16


def attend_long(
    query: torch.Tensor, *cache: torch.Tensor, **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention, which leaves nonsense where it was asked for next to nothing."""
    out, lse = flash_attn_varlen_func(query, *cache, **arguments)
    starts, used = arguments["cu_seqlens_q"], arguments["seqused_k"]
    for request, seq_len in enumerate(used.tolist()):
        start, end = starts[request : request + 2].tolist()
        if seq_len == end - start and end - start <= 4:
            out[start:end], lse[:, start:end] = torch.nan, torch.inf
    return out, lse


def attend(batch: Batch, rules: ScoreRules | None = None, num_few: int = 1) -> torch.Tensor:
    return run(batch, DTYPE, attend_long, rules, kernel=HybridKernel, decode_len=num_few)


@pytest.mark.parametrize("num_few", [1, 4])
@by_id
def test_the_oracle(case: Case, num_few: int) -> None:
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, DTYPE)
    assert_close(attend(batch, num_few=num_few), exact, tolerance)


@pytest.mark.parametrize("names", ["sinks", "softcap+sinks"])
@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_rules(names: str, pattern: tuple[int, int, int]) -> None:
    batch = make_batch(Case(names, ((0, 12), (64, 9), (399, 1)), pattern=pattern, head_size=16))
    rules = rules_of(names, batch)
    exact, tolerance = exact_and_tolerance(batch, DTYPE, rules)
    assert_close(attend(batch, rules), exact, tolerance)


@pytest.mark.parametrize("position", [10**6, 2**31 - 60])
def test_far_positions(position: int) -> None:
    requests = ((position, 40), (position + 3, 1))
    case = Case("mixed", requests, heads=(2, 1), head_size=16, block_size=256)
    near = dataclasses.replace(case, requests=((500, 40), (503, 1)))
    _, tolerance = exact_and_tolerance(make_batch(near), DTYPE)
    batch = make_batch(case)
    assert_close(attend(batch), batch.run_literal(), tolerance)


@pytest.mark.parametrize(("num_few", "queries"), [(1, 1), (4, 4), (4, 2), (30, 25)])
def test_decoding_is_for_triton_alone(num_few: int, queries: int) -> None:
    """In a captured graph nothing else may be launched; nor when a request's drafts don't fit into
    one tile."""
    batch = make_batch(Case("decode", ((300, queries), (80, 1)), heads=(8, 2), head_size=16))
    output = run(batch, DTYPE, "not to be called", kernel=HybridKernel, decode_len=num_few)
    assert torch.equal(output, batch.run_triton(DTYPE))


def test_a_decode_is_triton_s_whatever_is_beside_it() -> None:
    alone = make_batch(Case("decode", ((300, 1), (80, 1)), heads=(4, 2)))
    beside = make_batch(Case("mixed", ((300, 1), (80, 1), (40, 30)), heads=(4, 2)))
    for mine, theirs in zip(beside.stretches, alone.stretches, strict=False):
        mine.query, mine.key, mine.value = theirs.query, theirs.key, theirs.value
    # Into how many parts keys are split depends on the number of requests.
    torch.testing.assert_close(attend(beside)[:2], alone.run_triton(DTYPE), rtol=0, atol=2**-10)


@pytest.mark.parametrize("num_few", [1, 4])
def test_each_request_is_attended_by_one(num_few: int) -> None:
    """FlashAttention is told of no more keys than rows for those that Triton's kernels take: up
    to what fits into a tile of as many rows as decoding needs."""
    told: dict[str, Any] = {}

    def record(*tensors: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        told.update(arguments)
        return attend_long(*tensors, **arguments)

    requests = ((300, 1), (300, 2), (300, 4), (300, 5), (300, 40))
    batch = make_batch(Case("mixed", requests, heads=(8, 1), head_size=16))
    run(batch, DTYPE, record, kernel=HybridKernel, decode_len=num_few)
    in_a_tile = {1: 2, 4: 4}[num_few]
    for (_, queries), used in zip(requests, told["seqused_k"].tolist(), strict=True):
        assert (used == queries) == (queries <= in_a_tile)
        assert used <= 48 + 40 + 16


def test_padding() -> None:
    """Requests without rows, of whatever length was left behind."""
    batch = make_batch(Case("mixed", ((120, 1), (20, 9)), heads=(4, 2), head_size=16))
    expected = attend(batch)
    told = batch.device_batch()
    start = torch.cat((told.query_start_loc, told.query_start_loc[-1:]))
    for stale in (0, 2**31 - 1):
        lens = torch.cat((told.seq_lens, torch.tensor([stale], dtype=torch.int32)))
        table = torch.cat((told.block_table, torch.zeros_like(told.block_table[:1])))
        padded = dataclasses.replace(
            told, query_start_loc=start, seq_lens=lens, block_table=table, shared={}
        )
        output = run(batch, DTYPE, attend_long, kernel=HybridKernel, told=padded)
        torch.testing.assert_close(output, expected, rtol=0, atol=2**-10)
