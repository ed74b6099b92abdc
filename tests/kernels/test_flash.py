"""What FlashAttention is refused for, and what it is told.

What comes of it is tested in `tests.kernels.triton.interpreted.test_flash`.
"""

import dataclasses
from typing import Any

import pytest
import torch

from tests.kernels.batches import Case, make_batch
from tests.kernels.layers import make_layer, provider
from vllm_lminf.kernels.base import DeviceBatch, Heads, ScoreRules
from vllm_lminf.kernels.flash import FlashKernel, WindowTable
from vllm_lminf.pattern import LambdaPattern, cdiv

SERVED = make_layer(
    Heads(32, 8, 128, torch.bfloat16),
    LambdaPattern(10, 4096, 4096),
    device="cuda",
    capability=(9, 0),
)


def test_nothing_to_say() -> None:
    assert FlashKernel.unsupported_reasons(SERVED) == []
    rules = ScoreRules(1.0, softcap=2.0, sinks=torch.zeros(32))
    with_rules = dataclasses.replace(SERVED, rules=rules)
    assert FlashKernel.unsupported_reasons(with_rules) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu"), "capability": None}, "runs on NVIDIA's devices"),
        ({"capability": None}, "runs on NVIDIA's devices"),
        ({"capability": (7, 5)}, "compute capability 7.5: FlashAttention takes"),
        ({"heads": Heads(32, 8, 128, torch.float32)}, "torch.float32: FlashAttention takes"),
        ({"heads": Heads(32, 8, 512, torch.bfloat16)}, "heads of 512 dimensions: FlashAttention"),
        ({"cache_dtype": torch.float8_e4m3fn}, "--kv-cache-dtype auto"),
        ({"block_size": 24}, "blocks of 24 tokens: FlashAttention"),
        ({"rules": ScoreRules(1.0, alibi_slopes=torch.zeros(32))}, "ALiBi"),
        ({"heads": Heads(8 * 129, 8, 128, torch.bfloat16)}, "the prefix: "),
    ],
    ids=str,
)
def test_situations(change: dict[str, object], reason: str) -> None:
    reasons = FlashKernel.unsupported_reasons(dataclasses.replace(SERVED, **change))
    assert any(reason in given for given in reasons)


def make_kernel(rules: ScoreRules, attend: Any) -> FlashKernel:
    heads, pattern = Heads(6, 2, 16, torch.float16), LambdaPattern(0, 48, 48)
    return FlashKernel(make_layer(heads, pattern, rules, flash_attention=provider(attend)))


def test_alibi() -> None:
    with pytest.raises(ValueError, match="no ALiBi"):
        make_kernel(ScoreRules(0.1, alibi_slopes=torch.ones(6)), None)


def test_what_it_is_told() -> None:
    """All of it lies on the device, but for what bounds it."""
    told: dict[str, Any] = {}

    def attend(*tensors: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        told.update(arguments, tensors=tensors)
        return arguments["out"], torch.zeros(6, 14)

    batch = make_batch(Case("mixed", ((0, 5), (40, 9)), head_size=16, pattern=(0, 48, 48)))
    cache, description = batch.empty_cache(torch.float16), batch.device_batch()
    query = batch.query(torch.float16)
    output = torch.zeros_like(query)
    make_kernel(ScoreRules(0.1, softcap=3.0), attend).attend(query, cache, description, output)
    assert [tuple(x.shape) for x in told["tensors"]] == [
        (14, 6, 16),
        (batch.num_blocks, 16, 2, 16),
        (batch.num_blocks, 16, 2, 16),
    ]
    assert told["cu_seqlens_q"] is description.query_start_loc
    # Both requests begin in their first block here.
    assert torch.equal(told["seqused_k"], description.seq_lens)
    columns = told["block_table"].shape[1]
    assert torch.equal(told["block_table"], description.block_table[:, :columns])
    assert told["out"] is output
    assert told["max_seqlen_q"] == 9
    assert told["max_seqlen_k"] >= 49
    assert told["window_size"] == [47, 0]
    assert (told["softmax_scale"], told["softcap"], told["causal"]) == (0.1, 3.0, True)


class TestWindowTable:
    def test_no_entry_of_a_freed_block(self) -> None:
        """Of requests in all stages, one with a stale length and no rows among them."""
        batch = make_batch(
            Case("mixed", ((999, 1), (300, 40), (0, 5), (63, 2)), head_size=16, pattern=(3, 77, 77))
        )
        told = batch.device_batch()
        told.block_table.masked_fill_(told.block_table == 0, -7)
        start = torch.cat((told.query_start_loc, told.query_start_loc[-1:]))
        lens = torch.cat((told.seq_lens, torch.tensor([2**31 - 1], dtype=torch.int32)))
        table = torch.cat((told.block_table, torch.full_like(told.block_table[:1], -7)))
        cut = WindowTable.of(DeviceBatch(start, lens, table, 40), 77, 16)
        assert cut.block_table.dtype == cut.seq_lens.dtype == torch.int32
        for row, (computed, new) in enumerate(((999, 1), (300, 40), (0, 5), (63, 2))):
            first = max(0, computed - 76) // 16
            end = (computed + new - 1) // 16 + 1
            expected = told.block_table[row, first:end]
            assert (expected > 0).all()
            assert torch.equal(cut.block_table[row, : end - first], expected)
            assert cut.seq_lens[row] == computed + new - 16 * first
            assert cut.seq_lens[row] <= cut.longest
        assert 0 <= cut.seq_lens[4] <= cut.longest

    def test_it_is_made_once_a_step(self) -> None:
        told = make_batch(Case("decode", ((999, 1),), head_size=16)).device_batch()
        assert WindowTable.of(told, 48, 16) is WindowTable.of(told, 48, 16)
        assert WindowTable.of(told, 48, 16) is not WindowTable.of(told, 47, 16)

    def test_the_cost_does_not_grow(self) -> None:
        for seq_len in (1000, 10**6):
            tensors = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [seq_len]))
            table = torch.zeros(1, cdiv(seq_len, 16), dtype=torch.int32)
            cut = WindowTable.of(DeviceBatch(*tensors, table, 1), 100, 16)
            assert (cut.block_table.shape, cut.longest) == ((1, 8), 128)


def test_nothing_to_do() -> None:
    layer = make_kernel(ScoreRules(0.1), None)
    query, empty = torch.zeros(3, 6, 16), torch.zeros(0, dtype=torch.int32)
    none = DeviceBatch(torch.zeros(1, dtype=torch.int32), empty, empty.view(0, 0), 0)
    batch = make_batch(Case("decode", ((5, 1),), head_size=16))
    layer.attend(query, batch.empty_cache(torch.float16), none, query)
    layer.attend(query[:0], batch.empty_cache(torch.float16), batch.device_batch(), query[:0])
