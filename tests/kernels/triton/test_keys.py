"""What is compiled: all of it by a layer's warm-up, and nothing later, whatever batches come.

Launches are recorded with the key that Triton looks a compiled kernel up by; nothing is compiled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.kernels.layers import make_layer
from vllm_lminf.kernels.archive import ArchiveFormat, RecallBatch
from vllm_lminf.kernels.base import DeviceBatch, Heads, Kernel, PagedCache
from vllm_lminf.kernels.triton import layer as layer_module
from vllm_lminf.kernels.triton.layer import TritonKernel
from vllm_lminf.kernels.triton.plan import Hardware
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotarySpec

MAX_REQUESTS, MAX_TOKENS = 300, 2048
H100, A10 = Hardware(False, 90, 132, 227 * 1024), Hardware(False, 86, 72, 99 * 1024)
HEADS = [
    Heads(32, 8, 128, torch.bfloat16),
    Heads(9, 3, 40, torch.float16),
    Heads(71, 1, 64, torch.bfloat16),
]
QUERY_LENS = [1, 2, 4, 5, 8, 9, 16, 17, 65, 2000]


@contextmanager
def recorded() -> Iterator[set[tuple[str, str]]]:
    """Names and keys of what is compiled."""
    keys: set[tuple[str, str]] = set()
    run = JITFunction.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        run(self, *arguments, grid=grid, warmup=True, **options)

    def compiled(self: Any, key: Any, *arguments: Any) -> None:
        keys.add((self.fn.__name__, str(key)))

    target = GPUTarget("cuda", 90, 32)
    device = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: "none",
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(driver, "_active", device),
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(JITFunction, "_do_compile", compiled),
    ):
        yield keys


def make_kernel(
    heads: Heads, hardware: Hardware, kernel: type[Kernel] = TritonKernel, **more: Any
) -> Kernel:
    """A kernel for such hardware."""
    rotary = RotarySpec(torch.ones(heads.head_size // 2), True)
    more = {"block_size": 128, **more}
    layer = make_layer(heads, LambdaPattern(10, 4096, 4096), rotary=rotary, **more)
    with mock.patch.object(layer_module, "hardware_of", return_value=hardware):
        return kernel(layer)


def make_cache(heads: Heads) -> PagedCache:
    key, value = torch.empty(2, 4, 128, heads.num_kv_heads, heads.head_size, dtype=heads.dtype)
    return PagedCache(key.transpose(1, 2), value.transpose(1, 2))


def batches(max_requests: int, max_tokens: int) -> Iterator[tuple[int, DeviceBatch]]:
    """Batches of many sizes, whose tensors begin anywhere."""
    for requests in (*range(1, min(max_requests, 39) + 1), *range(40, max_requests + 1, 7)):
        for queries in QUERY_LENS:
            if queries > max_tokens:
                continue
            shift = (requests + queries) % 5
            numbers = torch.zeros(requests + 1 + shift, dtype=torch.int32)[shift:]
            table = torch.zeros(requests, 30 + shift, dtype=torch.int32)[:, shift:]
            yield (
                min(max_tokens, requests + queries - 1),
                DeviceBatch(numbers, numbers[1:], table, queries),
            )


@pytest.mark.parametrize(
    ("heads", "hardware"), list(zip(HEADS, [H100, A10, H100], strict=True)), ids=str
)
def test_warm_up_covers_all_batches(heads: Heads, hardware: Hardware) -> None:
    layer, cache = make_kernel(heads, hardware), make_cache(heads)
    with recorded() as warm:
        layer.warm_up(cache, MAX_REQUESTS, MAX_TOKENS)
    width = heads.num_heads + 2 * heads.num_kv_heads
    with recorded() as serving:
        for rows, batch in batches(MAX_REQUESTS, MAX_TOKENS):
            # Parts of a projection as it comes, or rows of their own.
            of_all = torch.empty(rows, width, heads.head_size, dtype=heads.dtype)
            query, key, value = of_all.split([heads.num_heads, *2 * [heads.num_kv_heads]], dim=1)
            output = torch.empty(rows, heads.num_heads, heads.head_size, dtype=heads.dtype)
            if rows % 2:
                query, key = query.contiguous(), key.contiguous()
            slots = torch.zeros(rows + rows % 3, dtype=torch.int64)[rows % 3 :]
            layer.write_cache(key, value, cache, slots)
            layer.attend(query, cache, batch, output)
    assert serving == warm
    assert {name for name, _ in warm} == {"write_kernel", "attention_kernel", "reduce_kernel"}


@pytest.mark.parametrize(
    ("heads", "hardware"), [(HEADS[0], H100), (Heads(9, 3, 48, torch.float16), A10)], ids=str
)
def test_warm_up_covers_all_searches(heads: Heads, hardware: Hardware) -> None:
    layer = make_kernel(heads, hardware, middle=Middle(5, 2048, 64))
    cache, size = make_cache(heads), ArchiveFormat(
        heads.num_kv_heads, heads.head_size, 128, heads.dtype
    ).page_bytes  # fmt: skip
    archive = torch.empty(3, size, dtype=torch.uint8)
    with recorded() as warm:
        layer.warm_up(cache, MAX_REQUESTS, MAX_TOKENS)
    with recorded() as serving:
        for rows, batch in batches(MAX_REQUESTS, MAX_TOKENS):
            query = torch.empty(rows, heads.num_heads, heads.head_size, dtype=heads.dtype)
            key = query[:, : heads.num_kv_heads]
            slots = torch.zeros(rows + rows % 3, dtype=torch.int64)[rows % 3 :]
            recall = RecallBatch(batch.block_table[:, rows % 2 :], slots, batch.seq_lens)
            layer.write_cache(key, key, cache, slots)
            layer.write_archive(key, key, archive, batch, recall)
            layer.attend_and_recall(query, cache, batch, archive, recall, query.clone())
    assert serving == warm
    assert {name for name, _ in warm} == {
        "write_kernel", "attention_kernel", "reduce_kernel", "keep_kernel", "index_kernel",
        "scan_kernel", "recall_kernel",
    }  # fmt: skip


@pytest.mark.parametrize(("max_requests", "max_tokens"), [(1, 1), (1, 4), (2, 64), (40, 1)])
def test_no_more_is_compiled_than_can_be_launched(max_requests: int, max_tokens: int) -> None:
    heads = HEADS[0]
    layer, cache = make_kernel(heads, H100), make_cache(heads)
    with recorded() as warm:
        layer.warm_up(cache, max_requests, max_tokens)
    with recorded() as serving:
        query = torch.empty(max_tokens, heads.num_heads, heads.head_size, dtype=heads.dtype)
        rows = query[:, : heads.num_kv_heads]
        layer.write_cache(rows, rows, cache, torch.zeros(max_tokens, dtype=torch.int64))
        for _, batch in batches(max_requests, max_tokens):
            layer.attend(query, cache, batch, torch.empty_like(query))
    assert serving == warm


def test_rows_that_no_kernel_is_compiled_for() -> None:
    heads = HEADS[0]
    layer, cache = make_kernel(heads, H100), make_cache(heads)
    query = torch.empty(3, heads.num_heads, heads.head_size + 1, dtype=heads.dtype)[..., :-1]
    _, batch = next(batches(1, 1))
    with recorded() as keys, pytest.raises(ValueError, match="multiples of 8"):
        layer.attend(query, cache, batch, query.contiguous())
    assert not keys
