"""The kernels for GPUs that can't run here: what they do with vLLM's cache and a batch."""

from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionCGSupport

from tests.kernels.layers import int32_batch, make_layer, provider
from vllm_lminf.kernels.base import Heads, Kernel, LayerConfig, PagedCache
from vllm_lminf.kernels.flash import FlashKernel
from vllm_lminf.kernels.hybrid import HybridKernel
from vllm_lminf.kernels.registry import kernel_class
from vllm_lminf.kernels.triton.layer import TritonKernel
from vllm_lminf.kernels.xformers import XformersKernel
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import backend, register
from vllm_lminf.plugin.backend import LambdaAttentionImpl

HEADS = Heads(4, 2, 16, torch.float32)


def layer(**more: Any) -> LayerConfig:
    return make_layer(HEADS, LambdaPattern(0, 9, 9), **more)


def write_and_attend(kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of one request, in the first slot of the third block: its value and what the
    kernel makes of it."""
    key, value = torch.randn(2, 1, 2, 16)
    cache = PagedCache.of(torch.full((4, 2, 16, 32), torch.nan), torch.float32)
    kernel.write_cache(key, value, cache, torch.tensor([2 * 16]))
    output = torch.full((1, 4, 16), torch.nan)
    kernel.attend(torch.randn(1, 4, 16), cache, int32_batch([0, 1], [1], [[2]]), output)
    return value, output


def test_triton() -> None:
    value, output = write_and_attend(TritonKernel(layer()))
    torch.testing.assert_close(output, value.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("decode_len", [1, 3])
def test_hybrid(decode_len: int) -> None:
    """A step in which a request decodes doesn't come near FlashAttention, and may be captured."""
    config = layer(decode_len=decode_len, flash_attention=provider("not to be called"))
    value, output = write_and_attend(HybridKernel(config))
    torch.testing.assert_close(output, value.repeat_interleave(2, dim=1))


def test_flash() -> None:
    """FlashAttention is handed pages as views of vLLM's cache."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert key.shape == value.shape == (4, 16, 2, 16)
        assert arguments["window_size"] == [8, 0]
        arguments["out"].copy_(value[2, 0].repeat_interleave(2, dim=0))
        return arguments["out"], torch.zeros(4, 1)

    value, output = write_and_attend(FlashKernel(layer(flash_attention=provider(attend))))
    torch.testing.assert_close(output, value.repeat_interleave(2, dim=1))


@pytest.mark.parametrize(
    ("kernel", "support"),
    [
        ("triton", AttentionCGSupport.ALWAYS),
        ("hybrid", AttentionCGSupport.UNIFORM_BATCH),
        ("flash", AttentionCGSupport.NEVER),
        ("xformers", AttentionCGSupport.NEVER),
        ("reference", AttentionCGSupport.NEVER),
    ],
)
def test_graphs(kernel: str, support: AttentionCGSupport) -> None:
    assert backend._GRAPHS[kernel_class(kernel).captures] is support


def make_kernel(asked: str) -> Kernel:
    operators = {"operators": "not to be called"} if asked == "xformers" else {}
    return kernel_class(asked)(layer(flash_attention=provider(None)), **operators)


@pytest.mark.parametrize("asked", ["flash", "hybrid", "xformers"])
def test_memory_of_a_step(asked: str) -> None:
    size = make_kernel(asked).temporary_bytes(1000, 8)
    log_sum_exps, keys = 4 * 1000 * 4, 2 * 4 * (8 * 8 + 1000) * 2 * 16
    assert size >= (keys if asked == "xformers" else log_sum_exps)


def test_memory_is_taken_in_a_run_without_attention(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment, which is where vLLM looks."""
    register()
    config: VllmConfig = EngineArgs(
        model=model_path, attention_backend="LMINF"
    ).create_engine_config()
    with set_current_vllm_config(config):
        impl = LambdaAttentionImpl(4, 16, 0.25, num_kv_heads=2)
    impl.kernel = kernel = make_kernel("flash")
    taken = []
    empty = torch.empty

    def record(*size: Any, **options: Any) -> torch.Tensor:
        taken.append(size)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", record)
    nothing = torch.zeros(1000, 4, 16)
    impl.forward(nn.Module(), nothing, nothing, nothing, nothing, None, nothing)
    most = config.scheduler_config.max_num_seqs
    assert taken == [(kernel.temporary_bytes(1000, most),)]


def test_xformers_writes_as_triton_does() -> None:
    assert XformersKernel.write_cache is TritonKernel.write_cache
