"""Which kernel runs: by the setting, by what is possible, and refused where both contradict."""

from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_lminf.attention import kernel
from vllm_lminf.attention.kernel import LayerKernel, compile_layer
from vllm_lminf.kernels import cpu
from vllm_lminf.kernels.interface import ScoreRules
from vllm_lminf.kernels.native import build
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.startup import UnsupportedError


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(kernel.logger, "warning_once", lambda text, *a: said.append(text % a))
    return said


class TestChoice:
    """What a layer runs, by the setting and by what is possible."""

    def compile(
        self,
        choice: str = "auto",
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        head_size: int = 64,
    ) -> object:
        rules = ScoreRules(1.0)
        return compile_layer(choice, torch.device(device), dtype, 4, 2, head_size, rules)

    def test_compiled_where_it_serves(self, warnings: list[str]) -> None:
        assert self.compile() is not None
        assert self.compile("cpu") is not None
        assert warnings == []

    def test_plain_where_asked_for_or_elsewhere(self, warnings: list[str]) -> None:
        assert self.compile("torch") is None
        assert self.compile(device="cuda") is None
        assert warnings == []

    def test_no_compiler(
        self,
        monkeypatch: pytest.MonkeyPatch,
        warnings: list[str],
    ) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        cpu.load.cache_clear()
        build.load_library.cache_clear()
        try:
            assert self.compile() is None
        finally:
            cpu.load.cache_clear()
            build.load_library.cache_clear()
        assert len(warnings) == 1
        assert "no-such-compiler" in warnings[0]
        assert "much slower" in warnings[0]

    def test_heads_that_do_not_fit(self, warnings: list[str]) -> None:
        assert self.compile(head_size=72) is None
        assert "72 dimensions" in warnings[0]

    @pytest.mark.parametrize(
        ("block_size", "dtype"), [(24, torch.float32), (32, torch.bfloat16)], ids=str
    )
    def test_a_cache_that_does_not_fit(
        self, block_size: int, dtype: torch.dtype, warnings: list[str]
    ) -> None:
        """Written and read by the plain kernel both, in its order."""
        rules, pattern = ScoreRules(0.25), LambdaPattern(0, 9, 9)
        layer = cpu.CpuLayer(2, 2, 16, torch.float32, rules)
        chosen = LayerKernel(layer, pattern, rules, None)
        assert chosen.name(block_size, dtype) == "torch"
        cache = torch.zeros(2, 2, block_size, 32, dtype=dtype)
        key = torch.arange(32.0).view(1, 2, 16)
        chosen.write_cache(key, -key, cache, torch.tensor([block_size + 1]))
        halves = cache.view(2, 2, 2, block_size, 16)
        assert torch.equal(halves[1, :, 0, 1].float(), key[0])
        assert torch.equal(halves[1, :, 1, 1].float(), -key[0])
        assert len(warnings) == 1
        assert "--block-size 128" in warnings[0]


class TestStartUp:
    """What a user gets who asks for the compiled kernel by name."""

    def engine(self, model_path: str, kernel: str, **arguments: Any) -> VllmConfig:
        config = {"lminf": {"kernel": kernel}}
        return EngineArgs(
            model=model_path, attention_backend="LMINF", additional_config=config, **arguments
        ).create_engine_config()

    @pytest.mark.parametrize("kernel", ["auto", "cpu", "torch"])
    def test_served(self, model_path: str, kernel: str) -> None:
        assert self.engine(model_path, kernel, block_size=32)

    def test_every_reason_at_once(self, model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        build.load_library.cache_clear()
        try:
            with pytest.raises(UnsupportedError) as refusal:
                self.engine(
                    model_path, "cpu", block_size=8, kv_cache_dtype="float16", dtype="bfloat16"
                )
        finally:
            build.load_library.cache_clear()
        for named in ("--block-size 8", "--kv-cache-dtype float16", "no-such-compiler"):
            assert named in str(refusal.value)
        assert all(reason.startswith("kernel 'cpu': ") for reason in refusal.value.reasons)
        assert len(refusal.value.reasons) == 3

    def test_other_kernels_take_any_block(self, model_path: str) -> None:
        assert self.engine(model_path, "auto", block_size=8)
        assert self.engine(model_path, "torch", block_size=8)
