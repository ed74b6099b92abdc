"""The Triton kernels on a device, against the oracle; torch and Triton are all they need."""

import dataclasses

import pytest
import torch

from tests.kernels.batches import Batch, Case, make_batch
from tests.kernels.cases import assert_close
from tests.kernels.triton.cases import (
    PATTERNS,
    RULES,
    by_id,
    exact_and_tolerance,
    far_by_id,
    rules_case,
    rules_of,
)
from tests.kernels.triton.window import log_sum_exp, window_attention
from vllm_lminf.kernels.base import DeviceBatch, PagedCache, ScoreRules
from vllm_lminf.kernels.triton.layer import TritonKernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
LOW_PRECISION = [torch.bfloat16, torch.float16]
LARGE = [
    # As served: 32 query heads, 8 key heads of 128, a window of 4096.
    Case("decode", tuple((n, 1) for n in (4095, 4096, 9000, 17)), heads=(32, 8), head_size=128,
         block_size=128, pattern=(10, 4096, 4096)),
    Case("chunked", ((6000, 300),), heads=(8, 2), head_size=128, pattern=(100, 4096, 4096)),
    Case("mixed", ((5000, 1), (5000, 200), (0, 70)), heads=(4, 2), head_size=256,
         pattern=(10, 1024, 2000), rotary_dim=64, is_neox_style=False),
]  # fmt: skip
MIXED = Case("mixed", ((700, 1), (20, 9), (0, 5), (900, 130)), pattern=(10, 400, 400))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@by_id
def test_the_oracle(case: Case, dtype: torch.dtype) -> None:
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, dtype)
    output = batch.run_triton(dtype, device=DEVICE)
    assert output.dtype == dtype
    assert_close(output, exact, tolerance)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_sizes_as_served(case: Case, dtype: torch.dtype) -> None:
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, dtype)
    assert_close(batch.run_triton(dtype, device=DEVICE), exact, tolerance)


@far_by_id
def test_far_positions(case: Case) -> None:
    """Tolerance as under the interpreter."""
    batch = make_batch(case)
    assert_close(batch.run_triton(torch.float32, device=DEVICE), batch.run_literal(), 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", RULES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rules(names: str, pattern: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch = make_batch(rules_case(names, pattern))
    exact, tolerance = exact_and_tolerance(batch, dtype, rules_of(names, batch))
    output = batch.run_triton(dtype, rules_of(names, batch, DEVICE), device=DEVICE)
    assert_close(output, exact, tolerance)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_cache(cache_dtype: torch.dtype, dtype: torch.dtype, scaled: bool) -> None:
    if cache_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton converts float8_e4m3fn on compute capability 8.9 and newer")
    scales = (0.5, 0.25) if scaled else (1.0, 1.0)
    batch = make_batch(MIXED)
    batch.quantise(cache_dtype, *scales)
    exact, tolerance = exact_and_tolerance(batch, dtype)
    cache = batch.empty_cache(cache_dtype, DEVICE)
    if scaled:
        key_scale, value_scale = (torch.tensor([scale], device=DEVICE) for scale in scales)
        cache = dataclasses.replace(cache, key_scale=key_scale, value_scale=value_scale)
    output = batch.run_triton(dtype, cache=cache, device=DEVICE)
    assert_close(output, exact, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", ["", "alibi", "softcap+sinks"])
def test_merge(names: str, dtype: torch.dtype) -> None:
    batch = make_batch(rules_case(names, (20, 37, 90)))
    rules = rules_of(names, batch)
    exact, tolerance = exact_and_tolerance(batch, dtype, rules)
    window, lse = window_attention(batch, rules)
    layer = TritonKernel(batch.layer(dtype, rules_of(names, batch, DEVICE), DEVICE))
    cache = batch.empty_cache(dtype, DEVICE)
    batch.fill(layer, cache, dtype)
    output, sums = window.to(DEVICE, dtype), lse.to(DEVICE, torch.float32).contiguous()
    told = batch.device_batch(DEVICE)
    layer.merge_global_branch(batch.query(dtype).to(DEVICE), cache, told, output, sums)
    # The window's result was rounded before, too.
    rounding = torch.finfo(dtype).eps * window.abs().max().item()
    assert_close(output.cpu(), exact, tolerance + rounding)
    if dtype == torch.float32:
        assert_close(sums.cpu(), log_sum_exp(batch, rules), 128 * torch.finfo(dtype).eps)


def ready(batch: Batch, dtype: torch.dtype) -> tuple:
    """A layer whose cache is filled, the queries, and the batch."""
    layer = TritonKernel(batch.layer(dtype, ScoreRules(batch.scale), DEVICE))
    cache = batch.empty_cache(dtype, DEVICE, heads_first=False)
    batch.fill(layer, cache, dtype)
    return layer, batch.query(dtype).to(DEVICE), cache, batch.device_batch(DEVICE)


@pytest.mark.parametrize("case", [MIXED, LARGE[0]], ids=lambda case: case.kind)
def test_equal_to_the_bit_every_time(case: Case) -> None:
    layer, query, cache, told = ready(make_batch(case), torch.bfloat16)
    outputs = []
    for _ in range(5):
        outputs.append(torch.full_like(query, torch.nan))
        layer.attend(query, cache, told, outputs[-1])
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_captured_graph_serves_other_batches() -> None:
    """Captured on padding alone, replayed on a mixed batch: shapes and bounds are all that a
    launch depends on."""
    batch = make_batch(MIXED)
    layer, query, cache, told = ready(batch, torch.bfloat16)
    expected = torch.full_like(query, torch.nan)
    layer.attend(query, cache, told, expected)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer.attend(query, cache, told, expected)
    assert torch.cuda.max_memory_allocated() == before, "a step allocates nothing"
    empty = dataclasses.replace(
        told,
        query_start_loc=torch.zeros_like(told.query_start_loc),
        seq_lens=torch.zeros_like(told.seq_lens),
        block_table=torch.zeros_like(told.block_table),
    )
    output = torch.full_like(query, torch.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.attend(query, cache, empty, output)
    graph.replay()
    assert output.isnan().all()
    empty.query_start_loc.copy_(told.query_start_loc)
    empty.seq_lens.copy_(told.seq_lens)
    empty.block_table.copy_(told.block_table)
    graph.replay()
    assert torch.equal(output, expected)


def test_a_cache_of_more_than_2_to_the_31_elements() -> None:
    """The batch's blocks are moved to the end of a cache whose offsets need 64 bits."""
    batch = make_batch(Case("mixed", ((120, 1), (60, 33)), head_size=128, block_size=128))
    layer, query, cache, told = ready(batch, torch.bfloat16)
    expected = torch.full_like(query, torch.nan)
    layer.attend(query, cache, told, expected)
    _, num_kv_heads, block_size, head_size = cache.key.shape
    num_blocks = 2**31 // (num_kv_heads * block_size * head_size) + 1 + batch.num_blocks
    shape = (num_blocks, num_kv_heads, block_size, head_size)
    needed = 2 * 2 * num_blocks * num_kv_heads * block_size * head_size
    if torch.cuda.mem_get_info()[0] < needed + 2**30:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory")
    key, value = (torch.empty(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    large = PagedCache(key, value)
    moved = dataclasses.replace(told, block_table=told.block_table + num_blocks - batch.num_blocks)
    large.key[-batch.num_blocks :] = cache.key
    large.value[-batch.num_blocks :] = cache.value
    output = torch.full_like(query, torch.nan)
    layer.attend(query, large, moved, output)
    assert torch.equal(output, expected)
    slots = torch.tensor([num_blocks * block_size - 1], device=DEVICE)
    rows = torch.ones(1, num_kv_heads, head_size, dtype=torch.bfloat16, device=DEVICE)
    layer.write_cache(rows, 2 * rows, large, slots)
    assert (large.key[-1, :, -1] == 1).all()
    assert (large.value[-1, :, -1] == 2).all()


@pytest.mark.parametrize("num_requests", [1, 3, 40, 300])
def test_any_number_of_splits(num_requests: int) -> None:
    """From many programs for a request to one."""
    lengths = [100 + 37 * r % 2900 for r in range(num_requests)]
    requests = tuple((n, 1) for n in lengths)
    batch = make_batch(Case("decode", requests, heads=(4, 2), pattern=(10, 2048, 2048)))
    exact, tolerance = exact_and_tolerance(batch, torch.bfloat16)
    assert_close(batch.run_triton(torch.bfloat16, device=DEVICE), exact, tolerance)


def test_padding_requests_are_never_looked_up() -> None:
    batch = make_batch(MIXED)
    layer, query, cache, told = ready(batch, torch.bfloat16)
    padded = DeviceBatch(
        torch.cat((told.query_start_loc, told.query_start_loc[-1:].expand(3))),
        torch.cat((told.seq_lens, torch.full_like(told.seq_lens[:3], 2**31 - 1))),
        torch.cat((told.block_table, torch.full_like(told.block_table[:3], 2**30))),
        told.max_query_len,
    )
    exact, tolerance = exact_and_tolerance(batch, torch.bfloat16)
    output = torch.full_like(query, torch.nan)
    layer.attend(query, cache, padded, output)
    assert_close(output.cpu(), exact, tolerance)
