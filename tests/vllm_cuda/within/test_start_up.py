"""From the user's arguments to a configuration: the plugin in vLLM for GPUs."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, Platform
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels.registry import choose
from vllm_lminf.plugin import checks, hosts, patches, wrapping
from vllm_lminf.plugin.config import LambdaConfig
from vllm_lminf.plugin.layer_config import layer_config_of

PINNED = Path(__file__).parents[3] / "requirements-vllm-cuda.txt"
DEVICES = [(8, 0), (9, 0), (10, 0)]


@pytest.fixture(autouse=True, scope="module")
def _plugin() -> None:
    """Loaded as vLLM loads it. The model's class is looked at here, since the process that vLLM
    would start for that has no stand-ins."""
    load_general_plugins()
    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)


def engine(model: str, kernel: str = "auto", **arguments: Any) -> VllmConfig:
    section = {"lminf": {"kernel": kernel, "n_local": 4096}}
    return EngineArgs(
        model=model, attention_backend="LMINF", additional_config=section, **arguments
    ).create_engine_config()


def chosen(config: VllmConfig) -> str | None:
    """What an engine's layers will run."""
    resolved = LambdaConfig.of(config)
    return choose(resolved.kernel, layer_config_of(config, resolved.pattern)).kernel


class TestEnvironment:
    def test_it_is_the_version_that_is_pinned(self) -> None:
        assert f"vllm=={vllm.__version__} " in PINNED.read_text(encoding="utf-8")
        assert version("vllm") == vllm.__version__

    def test_the_platform_is_nvidias(self) -> None:
        assert current_platform.is_cuda()
        assert current_platform.device_type == "cuda"

    def test_the_plugin_is_at_home(self) -> None:
        assert hosts.unsupported_environment() == []
        assert "LMINF" in AttentionBackendEnum.__members__

    def test_what_is_wrapped_is_there(self) -> None:
        wrapped = {f"{owner.__name__}.{name}" for owner, name in wrapping._originals}
        assert wrapped == {
            "EngineArgs.create_engine_config",
            "CpuPlatform.get_attn_backend_cls",
            "EngineCore.__init__",
            "Scheduler.make_stats",
            "Scheduler.update_from_output",
            "StatLoggerManager.__init__",
            "InputProcessor.process_inputs",
            "vllm.v1.engine.core.get_kv_cache_configs",
        }


class TestConfiguration:
    def test_variable(self, model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "LMINF")
        config = EngineArgs(model=model_path, max_model_len=1_000_000).create_engine_config()
        assert config.attention_config.backend is patches.backend_member()
        assert config.model_config.max_model_len == 1_000_000

    def test_stays_out_of_the_way(self, model_path: str) -> None:
        config = EngineArgs(model=model_path).create_engine_config()
        assert config.attention_config.backend is None
        assert config.model_config.max_model_len == 8192

    @pytest.mark.parametrize("method", ["ngram", "draft_model"])
    def test_drafts(self, method: str, model_path: str) -> None:
        drafter = {"method": method, "num_speculative_tokens": 2}
        if method == "draft_model":
            drafter["model"] = model_path
        config = engine(model_path, speculative_config=drafter, max_model_len=100_000)
        assert config.speculative_config.method == method
        if method == "draft_model":
            draft = config.speculative_config
            assert draft.attention_backend is patches.backend_member()
            assert draft.draft_model_config.max_model_len == 100_000

    def test_what_is_served_nowhere(self, model_path: str) -> None:
        with pytest.raises(UnsupportedError) as refusal:
            engine(model_path, kv_cache_dtype="int8_per_token_head", max_model_len=2**31)
        named = ("max_model_len", "--kv-cache-dtype int8_per_token_head")
        for reason, name in zip(refusal.value.reasons, named, strict=True):
            assert name in reason


class TestKernel:
    @pytest.mark.parametrize("capability", DEVICES, indirect=True, ids=str)
    def test_automatic_choice(self, capability: DeviceCapability, model_path: str) -> None:
        best = "hybrid" if capability == DeviceCapability(9, 0) else "triton"
        assert chosen(engine(model_path)) == best
        assert chosen(engine(model_path, "triton")) == "triton"
        assert chosen(engine(model_path, "reference")) == "reference"

    @pytest.mark.parametrize("capability", [(7, 5)], indirect=True, ids=str)
    def test_older_devices(self, capability: DeviceCapability, model_path: str) -> None:
        assert chosen(engine(model_path, dtype="float16")) == "reference"
        with pytest.raises(UnsupportedError, match=r"kernel 'triton': compute capability 7\.5"):
            engine(model_path, "triton", dtype="float16")

    def test_blocks_of_no_kernel_but_the_plain_one(self, model_path: str) -> None:
        assert chosen(engine(model_path, "reference", block_size=8)) == "reference"
        with pytest.raises(UnsupportedError, match="kernel 'triton': blocks of 8 tokens"):
            engine(model_path, block_size=8)

    def test_the_compiled_kernel_is_for_cpus(self, model_path: str) -> None:
        with pytest.raises(UnsupportedError, match="kernel 'cpu': it runs on CPUs, not on cuda"):
            engine(model_path, "cpu")

    def test_every_reason_at_once(self, model_path: str) -> None:
        for kernel in ("xformers", "flash", "hybrid"):
            with pytest.raises(UnsupportedError) as refusal:
                engine(model_path, kernel, block_size=8, kv_cache_dtype="fp8", dtype="float32")
            assert len(refusal.value.reasons) >= 3
            for reason in refusal.value.reasons:
                assert reason.startswith(f"kernel {kernel!r} with --kv-cache-dtype fp8: ")

    @pytest.mark.parametrize("kernel", ["flash", "hybrid"])
    def test_flash_attention_by_name(
        self, kernel: str, model_path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert chosen(engine(model_path, kernel)) == kernel
        monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", None)
        with pytest.raises(UnsupportedError, match=f"kernel '{kernel}': it isn't part of this"):
            engine(model_path, kernel)

    @pytest.mark.parametrize("capability", [(8, 9), (9, 0)], indirect=True, ids=str)
    @pytest.mark.parametrize("word", ["fp8", "fp8_e4m3", "fp8_e5m2"])
    def test_8_bits(self, word: str, capability: DeviceCapability, model_path: str) -> None:
        assert chosen(engine(model_path, kv_cache_dtype=word)) == "triton"

    @pytest.mark.parametrize("capability", [(8, 0)], indirect=True, ids=str)
    def test_8_bits_on_older_devices(self, capability: DeviceCapability, model_path: str) -> None:
        assert chosen(engine(model_path, kv_cache_dtype="fp8_e5m2")) == "triton"
        with pytest.raises(UnsupportedError) as refusal:
            engine(model_path, kv_cache_dtype="fp8")
        triton, reference = refusal.value.reasons
        assert "float8_e4m3fn on compute capability 8.0" in triton
        assert reference.startswith("kernel 'reference' with --kv-cache-dtype fp8")


class TestMiddle:
    """Which kernel recalls, and what no kernel does."""

    @staticmethod
    def engine(model: str, kernel: str = "auto", **more: Any) -> VllmConfig:
        arguments = {name: more.pop(name) for name in list(more) if not name.startswith("middle")}
        section = {"n_local": 4096, "kernel": kernel, "middle_top_k": 16, **more}
        return EngineArgs(
            model=model,
            attention_backend="LMINF",
            additional_config={"lminf": section},
            **arguments,
        ).create_engine_config()

    @pytest.mark.parametrize("capability", DEVICES, indirect=True, ids=str)
    def test_triton(self, capability: DeviceCapability, model_path: str) -> None:
        """On compute capability 9.0 too, where `hybrid` serves engines that recall nothing."""
        for config in (self.engine(model_path), self.engine(model_path, "triton")):
            resolved = LambdaConfig.of(config)
            layer = layer_config_of(config, resolved.pattern, resolved.middle)
            assert choose(resolved.kernel, layer).kernel == "triton"

    def test_the_plain_kernel_by_name(self, model_path: str) -> None:
        assert self.engine(model_path, "reference", middle_unit=32, middle_top_k=100)

    @pytest.mark.parametrize(
        ("asked", "named"),
        [
            ({"middle_unit": 32}, "single tokens, not blocks of 32: set middle_unit to token"),
            ({"middle_top_k": 65}, "up to 64 tokens a query: set middle_top_k, which is 65"),
        ],
        ids=["blocks", "many"],
    )
    def test_what_triton_does_not_recall(
        self, asked: dict[str, Any], named: str, model_path: str
    ) -> None:
        """No slower kernel takes its place."""
        for kernel in ("auto", "triton"):
            with pytest.raises(UnsupportedError) as refusal:
                self.engine(model_path, kernel, **asked)
            (reason,) = (r for r in refusal.value.reasons if r.startswith("kernel 'triton': "))
            assert named in reason
            assert not any("'reference'" in r for r in refusal.value.reasons)

    @pytest.mark.parametrize("kernel", ["hybrid", "flash", "xformers"])
    def test_kernels_that_recall_nothing(self, kernel: str, model_path: str) -> None:
        with pytest.raises(UnsupportedError, match=f"kernel '{kernel}': it recalls nothing"):
            self.engine(model_path, kernel)

    @pytest.mark.parametrize("capability", [(7, 5)], indirect=True, ids=str)
    def test_older_devices(self, capability: DeviceCapability, model_path: str) -> None:
        with pytest.raises(UnsupportedError, match=r"kernel 'triton': compute capability 7\.5"):
            self.engine(model_path, dtype="float16")

    def test_8_bits(self, model_path: str) -> None:
        with pytest.raises(UnsupportedError, match="--kv-cache-dtype fp8: the archive keeps no"):
            self.engine(model_path, kv_cache_dtype="fp8")

    def test_microbatches(self, model_path: str) -> None:
        """Which vLLM takes with few ways of communication alone."""
        config = self.engine(model_path)
        config.parallel_config.ubatch_size = 2
        with pytest.raises(UnsupportedError, match="and microbatches"):
            checks.check(config)


def test_no_platform_but_those(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.platforms, "_current_platform", Platform())
    monkeypatch.setattr(Platform, "device_type", "tpu", raising=False)
    (reason,) = hosts.unsupported_environment()
    assert "'tpu'" in reason
