"""Which kernel runs: by the setting, by what is possible, and refused where both contradict."""

import copy
import gc
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionCGSupport

from tests.kernels.layers import make_layer
from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels.base import Heads, PagedCache
from vllm_lminf.kernels.cpu import build, kernel
from vllm_lminf.kernels.cpu.kernel import CpuKernel, load
from vllm_lminf.kernels.reference import ReferenceKernel
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import backend, log
from vllm_lminf.plugin.backend import LambdaAttentionImpl
from vllm_lminf.plugin.config import LambdaConfig


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> list[str]:
    """What was said; the layers' engines are copies of one, of which nothing was told yet."""
    monkeypatch.setattr(log, "_said", log._Said())
    return said


class Layers:
    """Layers of two heads on the CPU, whose caches are still to come."""

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self._models: list[nn.Module] = []

    def __call__(
        self, kernel: str, head_size: int = 16, dtype: torch.dtype = torch.float32, **more: Any
    ) -> LambdaAttentionImpl:
        engine = copy.copy(self._config)
        resolved = replace(LambdaConfig.of(engine), kernel=kernel)
        engine.additional_config = resolved.added_to(engine.additional_config)
        with set_current_vllm_config(engine):
            impl = LambdaAttentionImpl(2, head_size, 0.25, alibi_slopes=[0.5, 0.25], **more)
            model = nn.Module()
            model.weight = nn.Parameter(torch.zeros(1))
            model.attn = nn.Module()
            model.attn.impl = impl
            self._models.append(model)
            impl.process_weights_after_loading(dtype)
        impl.make_ready(None)
        return impl


@pytest.fixture
def layer(config: VllmConfig) -> Iterator[Layers]:
    """``layer(kernel, head_size, dtype)``: one that was asked to run this kernel."""
    yield Layers(config)
    gc.collect()


class TestCompiled:
    """Whether a layer has the compiled kernel."""

    def test_where_it_serves(self, layer: Layers, warnings: list[str]) -> None:
        for asked in ("auto", "cpu"):
            assert layer(asked, 64, torch.bfloat16).kernel_class is CpuKernel
        assert warnings == []

    def test_not_where_another_was_asked_for(self, layer: Layers, warnings: list[str]) -> None:
        assert layer("reference", 64, torch.bfloat16).kernel_class is ReferenceKernel
        with pytest.raises(UnsupportedError, match="kernel 'triton': "):
            layer("triton", 64, torch.bfloat16)
        assert warnings == []

    def test_nothing_is_compiled_for_another_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "load_library", None)
        heads = Heads(4, 2, 64, torch.bfloat16)
        elsewhere = make_layer(heads, LambdaPattern(0, 9, 9), device="cuda")
        assert CpuKernel.unavailable_reasons(elsewhere) == []

    @pytest.mark.parametrize(
        ("compiler", "named"),
        [
            ("no-such-compiler", "no-such-compiler"),
            ('g++ "', "No closing quotation"),
            ("/dev/null", "no C.. compiler found"),
            ("true", "left no library"),
        ],
        ids=str,
    )
    def test_no_compiler(
        self,
        compiler: str,
        named: str,
        layer: Layers,
        monkeypatch: pytest.MonkeyPatch,
        warnings: list[str],
    ) -> None:
        monkeypatch.setenv("CXX", compiler)
        load.cache_clear()
        build.outcome_of.cache_clear()
        try:
            plain = layer("auto")
            assert plain.kernel_name(16, torch.float32) == "reference"
            with pytest.raises(UnsupportedError, match=f"kernel 'cpu': .*{named}"):
                layer("cpu")
        finally:
            load.cache_clear()
            build.outcome_of.cache_clear()
        (warning,) = warnings
        assert re.search(named, warning)
        assert "much slower" in warning


class TestChoice:
    """Which kernel a layer runs, once its cache is known."""

    def test_compiled(self, layer: Layers, warnings: list[str]) -> None:
        assert layer("auto").kernel_name(16, torch.float32) == "cpu"
        assert layer("cpu").kernel_name(32, torch.float32) == "cpu"
        assert warnings == []

    def test_its_name_says_how_it_computes(
        self, layer: Layers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for has_amx, name in ((True, "cpu (prefill by AMX)"), (False, "cpu")):
            monkeypatch.setattr(kernel, "has_amx", lambda dtype, answer=has_amx: answer)
            assert layer("cpu", 64, torch.bfloat16).kernel_name(16, torch.bfloat16) == name

    def test_plain_where_asked_for(self, layer: Layers, warnings: list[str]) -> None:
        assert layer("reference").kernel_name(7, torch.float32) == "reference"
        assert warnings == []

    def test_heads_that_do_not_fit(self, layer: Layers, warnings: list[str]) -> None:
        impl = layer("auto", 72, torch.bfloat16)
        assert impl.kernel_name(16, torch.bfloat16) == "reference"
        (warning,) = warnings
        assert "much slower" in warning
        assert "72 in bfloat16" in warning

    @pytest.mark.parametrize(
        ("block_size", "dtype", "named"),
        [(24, torch.float32, "--block-size 24"), (32, torch.bfloat16, "not in bfloat16")],
        ids=str,
    )
    def test_a_cache_that_does_not_fit(
        self,
        block_size: int,
        dtype: torch.dtype,
        named: str,
        layer: Layers,
        warnings: list[str],
    ) -> None:
        """Written and read by the plain kernel both, in its order; with the compiled kernel asked
        for by name, refused."""
        with pytest.raises(UnsupportedError, match=named):
            layer("cpu").kernel_name(block_size, dtype)
        impl = layer("auto")
        assert impl.kernel_name(block_size, dtype) == "reference"
        cache = torch.zeros(2, 2, block_size, 32, dtype=dtype)
        key = torch.arange(32.0).view(1, 2, 16)
        impl.do_kv_cache_update(nn.Module(), key, -key, cache, torch.tensor([block_size + 1]))
        halves = cache.view(2, 2, 2, block_size, 16)
        assert torch.equal(halves[1, :, 0, 1].float(), key[0])
        assert torch.equal(halves[1, :, 1, 1].float(), -key[0])
        (warning,) = warnings
        assert named in warning

    def test_none_runs_in_graphs_on_a_cpu(self, layer: Layers) -> None:
        for asked in ("auto", "reference"):
            kernel = layer(asked).kernel_for(16, torch.float32)
            assert backend._GRAPHS[kernel.captures] is AttentionCGSupport.NEVER

    def test_eight_bits_are_stored_as_bytes(self, layer: Layers) -> None:
        """vLLM calls such a cache bytes; what they are, the layer was told."""
        impl = layer("auto")
        impl.layer_config = replace(impl.layer_config, cache_dtype=torch.float8_e5m2)
        with pytest.raises(UnsupportedError, match="not in float8_e5m2"):
            impl.kernel_name(16, torch.uint8)


class TestBinding:
    """The cache that a layer was given last is looked at once."""

    def test_another_cache_is_another_one(self, layer: Layers) -> None:
        impl, holder = layer("auto"), nn.Module()
        key, slots = torch.ones(1, 2, 16), torch.tensor([16])
        for cache in torch.zeros(3, 2, 2, 16, 32):
            impl.do_kv_cache_update(holder, key, key, cache, slots)
            assert cache[1].any()
            bound = impl.bind(holder, cache)
            impl.do_kv_cache_update(holder, key, key, cache, slots)
            assert impl._bound is bound

    def test_it_is_not_kept_alive(self, layer: Layers) -> None:
        """vLLM makes one to measure with, and needs the memory back."""
        impl = layer("auto")
        memory = torch.zeros(2 * 2 * 16 * 32)
        cache = memory.view(2, 2, 16, 32)
        impl.do_kv_cache_update(
            nn.Module(), torch.ones(1, 2, 16), torch.ones(1, 2, 16), cache, torch.tensor([16])
        )
        halves = weakref.ref(impl._bound[1])
        del cache
        gc.collect()
        assert halves() is None

    def test_new_weights_may_have_new_scales(self, layer: Layers) -> None:
        impl, cache = layer("auto"), torch.zeros(2, 2, 16, 32)
        impl.bind(nn.Module(), cache)
        impl.process_weights_after_loading(torch.float32)
        assert impl._kv_cache() is None


class TestPagedCache:
    """vLLM's cache as kernels take it."""

    def test_as_it_is(self) -> None:
        """Each head of a block has its keys, then its values; scales belong to 8 bits alone."""
        kv_cache = torch.randn(3, 2, 16, 64)
        cache = PagedCache.of(kv_cache, torch.float32, torch.tensor(2.0), torch.tensor(3.0))
        assert cache.key.shape == cache.value.shape == (3, 2, 16, 32)
        assert cache.key.data_ptr() == kv_cache.data_ptr()
        assert torch.equal(cache.value[1, 1].flatten(), kv_cache[1, 1].flatten()[16 * 32 :])
        assert cache.key_scale is None
        assert cache.value_scale is None

    def test_bytes(self) -> None:
        kv_cache = torch.zeros(3, 2, 16, 64, dtype=torch.uint8)
        scales = torch.tensor(2.0), torch.tensor(3.0)
        cache = PagedCache.of(kv_cache, torch.float8_e5m2, *scales)
        cache.value[2, 1, 15, 31] = 1.5
        assert cache.key.dtype == torch.float8_e5m2
        assert (cache.key_scale, cache.value_scale) == scales
        assert kv_cache[2, 1].flatten()[-1] == torch.tensor(1.5).to(torch.float8_e5m2).view(
            torch.uint8
        )


class TestStartUp:
    """What a user gets who asks for the compiled kernel by name."""

    def engine(self, model_path: str, kernel: str, **arguments: Any) -> VllmConfig:
        config = {"lminf": {"kernel": kernel}}
        return EngineArgs(
            model=model_path, attention_backend="LMINF", additional_config=config, **arguments
        ).create_engine_config()

    @pytest.mark.parametrize("kernel", ["auto", "cpu", "reference"])
    def test_served(self, model_path: str, kernel: str) -> None:
        assert self.engine(model_path, kernel, block_size=32)

    def test_every_reason_at_once(self, model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        build.outcome_of.cache_clear()
        try:
            with pytest.raises(UnsupportedError) as refusal:
                self.engine(
                    model_path, "cpu", block_size=8, kv_cache_dtype="float16", dtype="bfloat16"
                )
        finally:
            build.outcome_of.cache_clear()
        for named in ("--block-size 8", "not in float16", "no-such-compiler"):
            assert named in str(refusal.value)
        for reason in refusal.value.reasons:
            assert reason.startswith("kernel 'cpu' with --kv-cache-dtype float16: ")
        assert len(refusal.value.reasons) == 3

    def test_other_kernels_take_any_block(self, model_path: str) -> None:
        assert self.engine(model_path, "auto", block_size=8)
        assert self.engine(model_path, "reference", block_size=8)
