"""How a layer hands its cache and batch to the kernels for GPUs that can't run here."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_lminf.kernels import xformers
from vllm_lminf.kernels.base import DeviceBatch, Heads, PagedCache, ScoreRules, Situation
from vllm_lminf.kernels.registry import Choice
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import layer_kernel, versions
from vllm_lminf.plugin.layer_kernel import (
    FlashKernel,
    HybridKernel,
    Kernel,
    Layer,
    LayerKernel,
    TritonKernel,
    XformersKernel,
)
from vllm_lminf.plugin.metadata import LambdaMetadata

HEADS = Heads(4, 2, 16, torch.float32)
SITUATION = Situation(
    "cpu", None, HEADS, LambdaPattern(0, 9, 9), torch.float32, 16, has_rotation=False
)
LAYER = Layer(SITUATION, ScoreRules(0.25), None, None, torch.device("cpu"), "an engine")


def write_and_attend(kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token of one request, in the second slot of the third block: its key, its value and
    what the kernel makes of it."""
    key, value = torch.randn(2, 1, 2, 16)
    cache = torch.full((4, 2, 16, 32), torch.nan)
    kernel.write_cache(key, value, cache, torch.tensor([2 * 16, -1])[:1], None)
    batch = DeviceBatch(
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=torch.tensor([1], dtype=torch.int32),
        block_table=torch.tensor([[2]], dtype=torch.int32),
        max_query_len=1,
    )
    output = torch.full((1, 4, 16), torch.nan)
    kernel.attend(torch.randn(1, 4, 16), cache, LambdaMetadata(1, batch), output, None)
    return key, value, output


def test_triton() -> None:
    _, value, output = write_and_attend(TritonKernel(LAYER))
    torch.testing.assert_close(output, value.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("decode_len", [1, 3])
def test_hybrid(decode_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in which a request decodes doesn't come near FlashAttention, and may be captured."""
    monkeypatch.setattr(versions, "flash_attention", lambda head_size: "not to be called")
    kernel = HybridKernel(replace(LAYER, decode_len=decode_len))
    _, value, output = write_and_attend(kernel)
    torch.testing.assert_close(output, value.repeat_interleave(2, dim=1))
    assert HybridKernel.in_graphs is AttentionCGSupport.UNIFORM_BATCH


def test_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention is handed pages as views of vLLM's cache."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert key.shape == value.shape == (4, 16, 2, 16)
        assert arguments["window_size"] == [8, 0]
        arguments["out"].copy_(value[2, 0].repeat_interleave(2, dim=0))
        return arguments["out"], torch.zeros(4, 1)

    monkeypatch.setattr(versions, "flash_attention", lambda head_size: attend)
    _, value, output = write_and_attend(FlashKernel(LAYER))
    torch.testing.assert_close(output, value.repeat_interleave(2, dim=1))
    assert FlashKernel.in_graphs is AttentionCGSupport.NEVER


def test_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        def __init__(self, heads: Heads, pattern: LambdaPattern, *_: Any) -> None:
            assert (heads, pattern) == (HEADS, SITUATION.pattern)

        def lambda_attention(
            self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
        ) -> None:
            output.copy_(cache.value[2, :, 0].repeat_interleave(2, dim=0))

    monkeypatch.setattr(xformers, "XformersLayer", Recorder)
    _, value, output = write_and_attend(XformersKernel(LAYER))
    torch.testing.assert_close(output, value.repeat_interleave(2, dim=1))
    assert XformersKernel.in_graphs is AttentionCGSupport.NEVER


@pytest.mark.parametrize("asked", ["flash", "hybrid", "xformers"])
def test_memory_of_a_step(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for a moment in a run without attention, which is where vLLM looks."""
    monkeypatch.setattr(layer_kernel, "choose", lambda *_: Choice(asked, {}))
    taken = []
    empty = torch.empty

    def record(*size: Any, **options: Any) -> torch.Tensor:
        taken.append(size)
        return empty(*size, **options)

    kernel = LayerKernel(asked, LAYER)
    monkeypatch.setattr(torch, "empty", record)
    kernel.take_memory(1000, 8)
    ((size,),) = taken
    log_sum_exps, keys = 4 * 1000 * 4, 2 * 4 * (8 * 8 + 1000) * 2 * 16
    assert size >= (keys if asked == "xformers" else log_sum_exps)
