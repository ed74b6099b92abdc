"""Which kernel runs: by the setting, by what is possible, and refused where both contradict."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels.base import Heads, ScoreRules, Situation
from vllm_lminf.kernels.cpu import build
from vllm_lminf.kernels.cpu.kernel import CpuLayer, load
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import layer_kernel
from vllm_lminf.plugin.layer_kernel import Layer, LayerKernel, compile_layer, paged_cache


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(layer_kernel.logger, "warning_once", lambda text, *a: said.append(text % a))
    return said


def make_layer(
    compiled: CpuLayer | None, head_size: int = 16, dtype: torch.dtype = torch.float32
) -> Layer:
    """A layer on the CPU with two heads."""
    heads = Heads(2, 2, head_size, dtype)
    situation = Situation("cpu", None, heads, LambdaPattern(0, 9, 9), dtype, 16, has_rotation=False)
    return Layer(situation, ScoreRules(0.25), None, compiled, torch.device("cpu"), None)


class TestCompiled:
    """Whether a layer has the compiled kernel."""

    def compile(
        self,
        asked: str = "auto",
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        head_size: int = 64,
    ) -> CpuLayer | None:
        heads = Heads(4, 2, head_size, dtype)
        return compile_layer(asked, torch.device(device), heads, ScoreRules(1.0))

    def test_where_it_serves(self, warnings: list[str]) -> None:
        assert self.compile() is not None
        assert self.compile("cpu") is not None
        assert warnings == []

    def test_not_where_another_was_asked_for_or_elsewhere(self, warnings: list[str]) -> None:
        assert self.compile("reference") is None
        assert self.compile("triton") is None
        assert self.compile(device="cuda") is None
        assert warnings == []

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
        self, compiler: str, named: str, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
    ) -> None:
        monkeypatch.setenv("CXX", compiler)
        load.cache_clear()
        build.outcome_of.cache_clear()
        try:
            assert self.compile() is None
            with pytest.raises(UnsupportedError, match=f"kernel 'cpu': .*{named}"):
                self.compile("cpu")
        finally:
            load.cache_clear()
            build.outcome_of.cache_clear()
        assert len(warnings) == 1
        assert re.search(named, warnings[0])
        assert "much slower" in warnings[0]
        assert LayerKernel("auto", make_layer(None)).name(16, torch.float32) == "reference"
        assert len(warnings) == 1


class TestChoice:
    """Which kernel a layer runs, once its cache is known."""

    def test_compiled(self, warnings: list[str]) -> None:
        layer = CpuLayer(2, 2, 16, torch.float32, ScoreRules(0.25))
        assert LayerKernel("auto", make_layer(layer)).name(16, torch.float32) == "cpu"
        assert LayerKernel("cpu", make_layer(layer)).name(32, torch.float32) == "cpu"
        assert warnings == []

    def test_plain_where_asked_for(self, warnings: list[str]) -> None:
        assert LayerKernel("reference", make_layer(None)).name(7, torch.float32) == "reference"
        assert warnings == []

    def test_heads_that_do_not_fit(self, warnings: list[str]) -> None:
        layer = make_layer(None, head_size=72, dtype=torch.bfloat16)
        assert LayerKernel("auto", layer).name(16, torch.bfloat16) == "reference"
        (warning,) = warnings
        assert "much slower" in warning
        assert "72 in bfloat16" in warning

    @pytest.mark.parametrize(
        ("block_size", "dtype", "named"),
        [(24, torch.float32, "--block-size 24"), (32, torch.bfloat16, "not in bfloat16")],
        ids=str,
    )
    def test_a_cache_that_does_not_fit(
        self, block_size: int, dtype: torch.dtype, named: str, warnings: list[str]
    ) -> None:
        """Written and read by the plain kernel both, in its order; with the compiled kernel asked
        for by name, refused."""
        layer = make_layer(CpuLayer(2, 2, 16, torch.float32, ScoreRules(0.25)))
        with pytest.raises(UnsupportedError, match=named):
            LayerKernel("cpu", layer).name(block_size, dtype)
        chosen = LayerKernel("auto", layer)
        assert chosen.name(block_size, dtype) == "reference"
        cache = torch.zeros(2, 2, block_size, 32, dtype=dtype)
        key = torch.arange(32.0).view(1, 2, 16)
        chosen.write_cache(key, -key, cache, torch.tensor([block_size + 1]))
        halves = cache.view(2, 2, 2, block_size, 16)
        assert torch.equal(halves[1, :, 0, 1].float(), key[0])
        assert torch.equal(halves[1, :, 1, 1].float(), -key[0])
        (warning,) = warnings
        assert named in warning

    def test_none_runs_in_graphs_on_a_cpu(self) -> None:
        compiled = make_layer(CpuLayer(2, 2, 16, torch.float32, ScoreRules(0.25)))
        for asked in ("auto", "reference"):
            support = LayerKernel(asked, compiled).in_graphs(16, torch.float32)
            assert support is AttentionCGSupport.NEVER

    def test_eight_bits_are_stored_as_bytes(self) -> None:
        """vLLM calls such a cache bytes; what they are, the layer was told."""
        layer = make_layer(None)
        layer = replace(layer, situation=replace(layer.situation, cache_dtype=torch.float8_e5m2))
        with pytest.raises(UnsupportedError, match="not in float8_e5m2"):
            LayerKernel("auto", layer).name(16, torch.uint8)


class TestPagedCache:
    """vLLM's cache as the kernels for GPUs take it."""

    def test_as_it_is(self) -> None:
        """Each head of a block has its keys, then its values; scales belong to 8 bits alone."""
        kv_cache = torch.randn(3, 2, 16, 64)
        cache = paged_cache(kv_cache, torch.float32, (torch.tensor(2.0), torch.tensor(3.0)))
        assert cache.key.shape == cache.value.shape == (3, 2, 16, 32)
        assert cache.key.data_ptr() == kv_cache.data_ptr()
        assert torch.equal(cache.value[1, 1].flatten(), kv_cache[1, 1].flatten()[16 * 32 :])
        assert cache.key_scale is None
        assert cache.value_scale is None

    def test_bytes(self) -> None:
        kv_cache = torch.zeros(3, 2, 16, 64, dtype=torch.uint8)
        scales = torch.tensor(2.0), torch.tensor(3.0)
        cache = paged_cache(kv_cache, torch.float8_e5m2, scales)
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
