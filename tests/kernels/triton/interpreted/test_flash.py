"""FlashAttention's window with the prefix merged in by the real kernel, interpreted.

A CPU has no FlashAttention: `flash_attn_varlen_func` stands in for it, by its documentation.
"""

import dataclasses
import math

import pytest
import torch

from tests.kernels.batches import Case, make_batch
from tests.kernels.cases import assert_close
from tests.kernels.flash_batches import by_id, run
from tests.kernels.triton.cases import PATTERNS, exact_and_tolerance, rules_of

TILE = 176
"""Keys of a tile: FlashAttention 3's for small heads, which no block size divides."""


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    max_seqlen_q: int,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_k: int,
    seqused_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: list[int],
    softcap: float,
    block_table: torch.Tensor,
    return_softmax_lse: bool,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over pages [blocks, tokens, heads, head_size], query by query.

    Keys are loaded tile by tile, from the tile on in which a row's window begins: scores of those
    that it doesn't see are hidden, and their values are multiplied with zero.
    """
    assert causal
    assert return_softmax_lse
    assert k.stride(-1) == v.stride(-1) == 1
    block_size, group = k.shape[1], q.shape[1] // k.shape[2]
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    for request, seq_len in enumerate(seqused_k.tolist()):
        start, end = cu_seqlens_q[request : request + 2].tolist()
        assert end - start <= max_seqlen_q
        assert seq_len <= max_seqlen_k
        for row in range(start, end):
            i = row - end + seq_len
            left, right = window_size
            first = max(0, i - left)
            loaded = torch.arange(first // TILE * TILE, min(i + right, seq_len - 1) + 1)
            block = block_table[request, loaded // block_size].long()
            key, value = (
                x[block, loaded % block_size].float().repeat_interleave(group, dim=1)
                for x in (k, v)
            )
            scores = torch.einsum("hd,nhd->hn", q[row].float(), key) * softmax_scale
            if softcap > 0:
                scores = softcap * (scores / softcap).tanh()
            scores = scores.masked_fill(loaded < first, -torch.inf)
            lse[:, row] = scores.logsumexp(-1)
            out[row] = torch.einsum("hn,nhd->hd", scores.softmax(-1), value).to(out.dtype)
    return out, lse


@by_id
def test_the_oracle(case: Case) -> None:
    dtype = torch.bfloat16 if case.kind == "chunked" else torch.float16
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, dtype)
    output = run(batch, dtype, flash_attn_varlen_func)
    assert output.dtype == dtype
    assert_close(output, exact, tolerance)


@pytest.mark.parametrize("names", ["sinks", "softcap+sinks"])
@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_rules(names: str, pattern: tuple[int, int, int]) -> None:
    batch = make_batch(Case(names, ((0, 12), (64, 9), (399, 1)), pattern=pattern, head_size=16))
    rules = rules_of(names, batch)
    exact, tolerance = exact_and_tolerance(batch, torch.float16, rules)
    assert_close(run(batch, torch.float16, flash_attn_varlen_func, rules), exact, tolerance)


@pytest.mark.parametrize("position", [10**6, 2**31 - 60])
def test_far_positions(position: int) -> None:
    case = Case("chunked", ((position, 40),), heads=(2, 1), head_size=16, block_size=256)
    near = dataclasses.replace(case, requests=((500, 40),))
    _, tolerance = exact_and_tolerance(make_batch(near), torch.float16)
    batch = make_batch(case)
    output = run(batch, torch.float16, flash_attn_varlen_func)
    assert_close(output, batch.run_literal(), tolerance)


def test_the_stand_in_is_a_window() -> None:
    """It is the oracle of a pure window, and its log-sum-exp is that of the visible scores."""
    batch = make_batch(Case("mixed", ((30, 9), (0, 5)), heads=(2, 1), pattern=(0, 16, 16)))
    exact, tolerance = exact_and_tolerance(batch, torch.float16)
    assert_close(run(batch, torch.float16, flash_attn_varlen_func), exact, tolerance)
    query, told = torch.zeros(1, 2, 8), batch.device_batch()
    cache = torch.zeros(batch.num_blocks, 16, 1, 8)
    _, lse = flash_attn_varlen_func(
        query, cache, cache, max_seqlen_q=1, cu_seqlens_q=torch.tensor([0, 1]), max_seqlen_k=64,
        seqused_k=torch.tensor([30]), softmax_scale=1.0, causal=True, window_size=[15, 0],
        softcap=0.0, block_table=told.block_table, return_softmax_lse=True, out=query,
    )  # fmt: skip
    assert lse.flatten().tolist() == pytest.approx([math.log(16)] * 2)
