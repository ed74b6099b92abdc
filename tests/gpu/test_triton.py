"""The Triton kernels on a device, against the oracle; torch and Triton are all they need."""

import dataclasses

import pytest
import torch

from tests.kernels.batches import Batch, Case, make_batch
from tests.kernels.cases import assert_close
from tests.kernels.layers import int32_batch
from tests.kernels.recall_batches import RECALL_CASES, RecallCase, Requests, middle
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
from vllm_lminf.kernels.archive import RecallBatch
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


RECALLED = [
    case for case in RECALL_CASES if case.middle.block_size == 1 and case.middle.top_k <= 64
]
EXACT = 2e-5
"""As under the interpreter: in float32, of outputs of size 1."""


@pytest.mark.parametrize("chunk", [10**6, 33])
@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
@pytest.mark.parametrize("case", RECALLED, ids=str)
def test_recall(case: RecallCase, chunk: int, together: bool) -> None:
    requests = Requests(case)
    steps = case.steps(chunk, together)
    outputs = requests.run(TritonKernel, steps, torch.float32, exact=False, device=DEVICE)
    for output, expected in zip(outputs, requests.expected(), strict=True):
        assert_close(output, expected, EXACT)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_recall_in_low_precision(head_size: int, dtype: torch.dtype) -> None:
    """All of the middle, which rounding doesn't choose from."""
    case = RecallCase(
        ((80, 84), (60, 61)), middle(top_k=64), heads=(8, 2), head_size=head_size, block_size=32
    )
    requests = Requests(case)
    exact, rounded = requests.expected(), requests.expected(dtype)
    loss = max((a.double() - b).abs().max().item() for a, b in zip(rounded, exact, strict=True))
    steps = case.steps(64, together=True)
    outputs = requests.run(TritonKernel, steps, dtype, exact=False, device=DEVICE)
    for output, expected in zip(outputs, exact, strict=True):
        assert_close(output, expected, 4 * loss)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("in_host_memory", [False, True])
def test_a_long_middle(dtype: torch.dtype, in_host_memory: bool) -> None:
    """As served, in a graph that was captured on padding: the best keys are those that all scores
    in float64 give, wherever they are far enough apart, and searches are certain at once."""
    num_keys, top_k = 32768, 5
    case = RecallCase(
        ((num_keys, num_keys),), middle(top_k=top_k, rows=1), heads=(32, 8), head_size=128,
        block_size=128, pattern=(10, 4096, 4096), rotary_dim=0,
    )  # fmt: skip
    ((drawn_query, drawn_key, drawn_value),) = Requests(case).drawn
    layer = case.layer(dtype, exact=False, device=DEVICE)
    kernel, num_pages = TritonKernel(layer), num_keys // 128
    query, key, value = (x.to(DEVICE, dtype) for x in (drawn_query, drawn_key, drawn_value))
    size = num_pages, layer.archive_format.page_bytes
    archive = torch.full(size, 255, dtype=torch.uint8, device=DEVICE)
    pages = torch.arange(num_pages, dtype=torch.int32, device=DEVICE)[None]
    slots = torch.arange(num_keys, device=DEVICE)
    cache = PagedCache(*torch.zeros(2, num_pages, 8, 128, 128, dtype=dtype, device=DEVICE))
    kernel.write_cache(key, value, cache, slots)
    told = int32_batch([0, num_keys], [num_keys], pages.tolist(), DEVICE)
    looks = torch.tensor([num_keys - 1], dtype=torch.int32, device=DEVICE)
    kernel.write_archive(key, value, archive, told, RecallBatch(pages, slots, looks))
    if in_host_memory:
        torch_utils = pytest.importorskip("vllm.utils.torch_utils")
        pinned = archive.cpu().pin_memory()
        archive = torch_utils.get_accelerator_view_from_cpu_tensor(pinned)
    one = int32_batch([0, 0], [0], pages.tolist(), DEVICE)
    one = dataclasses.replace(one, max_query_len=1)
    recall = RecallBatch(pages, slots[-1:], looks)
    rows, output = query[-1:], torch.full_like(query[-1:], torch.nan)
    kernel.attend_and_recall(rows, cache, one, archive, recall, output)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.attend_and_recall(rows, cache, one, archive, recall, output)
    graph.replay()
    assert output.isnan().all()
    one.query_start_loc[1], one.seq_lens[0] = 1, num_keys
    assert kernel.search_counts is not None
    kernel.search_counts.zero_()
    graph.replay()

    seen = [*range(10), *range(num_keys - 4096, num_keys)]
    expected = torch.empty(32, 128, dtype=torch.float64, device=DEVICE)
    for head in range(32):
        products = key[:, head // 4].double() @ rows[0, head].double()
        best = 10 + products[10 : num_keys - 4096].topk(top_k).indices
        chosen = torch.cat((best, torch.tensor(seen, device=DEVICE)))
        weights = (products[chosen] * case.head_size**-0.5).softmax(dim=0)
        expected[head] = weights @ value[chosen, head // 4].double()
    tolerance = EXACT if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert_close(output[0].cpu(), expected.cpu(), tolerance)
    searched, again = kernel.search_counts.tolist()
    assert searched == 32
    assert again <= 1


def test_recall_equal_to_the_bit_every_time() -> None:
    case = RecallCase(((300, 303), (90, 91)), middle(rows=40), heads=(8, 2), head_size=64)
    outputs = [
        Requests(case).run(
            TritonKernel, case.steps(64, together=True), torch.bfloat16, exact=False, device=DEVICE
        )
        for _ in range(3)
    ]
    for others in outputs[1:]:
        assert all(map(torch.equal, outputs[0], others))
