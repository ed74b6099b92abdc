"""What the backend declares, as vLLM's platforms for GPUs ask about it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.platforms
from vllm.config import set_current_vllm_config
from vllm.config.cache import CacheConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_lminf.kernels.base import Heads
from vllm_lminf.kernels.triton.plan import Hardware, decode_plan, prefill_plan
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import hosts, patches, register
from vllm_lminf.plugin.backend import LambdaAttentionBackend

DEVICES = [(8, 0), (9, 0), (10, 0)]


@pytest.fixture(autouse=True, scope="module")
def _plugin() -> None:
    register()


def layer(**changes: Any) -> AttentionSelectorConfig:
    """What vLLM asks a backend for, for one layer."""
    asked = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
    }
    return AttentionSelectorConfig(**{**asked, **changes})


def reasons_against(capability: tuple[int, int], **changes: Any) -> list[str]:
    asked = layer(**changes)._asdict()
    return LambdaAttentionBackend.validate_configuration(
        device_capability=DeviceCapability(*capability), **asked
    )


class TestValidation:
    @pytest.mark.parametrize("capability", DEVICES, ids=str)
    @pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_served(self, capability: tuple[int, int], head_size: int, dtype: torch.dtype) -> None:
        for changes in ({}, {"has_sink": True}, {"has_sliding_window": True}):
            assert not reasons_against(capability, head_size=head_size, dtype=dtype, **changes)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"dtype": torch.float64}, "dtype"),
            ({"block_size": 24}, "block_size"),
            ({"use_mla": True}, "MLA"),
            ({"use_sparse": True}, "sparse"),
            ({"use_mm_prefix": True}, "multimodal"),
            ({"use_per_head_quant_scales": True}, "per-head quant scales"),
            ({"attn_type": "encoder_only"}, "attention type"),
            ({"use_non_causal": True}, "non-causal"),
            ({"use_batch_invariant": True}, "batch invariance"),
            ({"use_kv_connector": True}, "KV connector"),
            ({"use_pcp": True}, "PCP"),
            ({"use_dcp": True}, "DCP"),
            ({"use_rswa": True}, "R-SWA"),
            ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype"),
            ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @pytest.mark.parametrize("capability", DEVICES, ids=str)
    def test_every_reason(
        self, capability: tuple[int, int], changes: dict[str, Any], named: str
    ) -> None:
        assert named in "; ".join(reasons_against(capability, **changes))

    def test_reasons_come_together(self) -> None:
        changes = {"use_mla": True, "use_kv_connector": True, "use_batch_invariant": True}
        assert len(reasons_against((9, 0), **changes)) == 3

    def test_8_bits_by_what_the_device_converts(self) -> None:
        assert not reasons_against((8, 0), kv_cache_dtype="fp8_e5m2")
        for word in ("fp8", "fp8_e4m3", "fp8_e5m2"):
            assert not reasons_against((9, 0), kv_cache_dtype=word)
        (reason,) = reasons_against((8, 0), kv_cache_dtype="fp8")
        assert "kernel 'triton': a cache of float8_e4m3fn on compute capability 8.0" in reason
        assert "kernel 'reference': " in reason

    @pytest.mark.parametrize("capability", [(7, 5), (8, 0)], indirect=True, ids=str)
    def test_the_kernel_that_was_asked_for(
        self, capability: DeviceCapability, model_path: str
    ) -> None:
        """A kernel by name is what the engine was configured with; on its own it says no more
        than an automatic choice does."""
        section = {"lminf": {"kernel": "reference", "n_local": 512}}
        config = EngineArgs(
            model=model_path, attention_backend="LMINF", additional_config=section, block_size=24
        ).create_engine_config()
        device = capability.major, capability.minor
        with set_current_vllm_config(config):
            assert not reasons_against(device, block_size=24)
            assert LambdaAttentionBackend.get_supported_kernel_block_sizes() == [MultipleOf(1)]
            assert reasons_against(device, kv_cache_dtype="fp8_e5m2")


class TestSelection:
    @pytest.mark.parametrize("capability", DEVICES, indirect=True, ids=str)
    def test_nvidia(self, capability: DeviceCapability) -> None:
        path = current_platform.get_attn_backend_cls(patches.backend_member(), layer())
        assert path == f"{LambdaAttentionBackend.__module__}.{LambdaAttentionBackend.__name__}"

    def test_nvidia_refuses_with_the_reason(self) -> None:
        with pytest.raises(ValueError, match="KV connector"):
            current_platform.get_attn_backend_cls(
                patches.backend_member(), layer(use_kv_connector=True)
            )

    def test_the_automatic_choice_is_another(self) -> None:
        assert "LMINF" not in current_platform.get_attn_backend_cls(None, layer())

    def test_amd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """AMD's platform chooses in the same way; a device's number means something else there."""
        device = SimpleNamespace(gcnArchName="gfx942")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: device)
        from vllm.platforms import rocm

        platform = rocm.RocmPlatform()
        monkeypatch.setattr(vllm.platforms, "_current_platform", platform)
        monkeypatch.setattr("vllm_lminf.plugin.backend.current_platform", platform)
        assert hosts.unsupported_environment() == []
        member = patches.backend_member()
        assert platform.get_device_capability() == DeviceCapability(9, 4)
        assert platform.get_attn_backend_cls(member, layer()) == member.get_path()
        with pytest.raises(ValueError, match="float8_e4m3fnuz"):
            platform.get_attn_backend_cls(member, layer(kv_cache_dtype="fp8"))


def test_one_memory_order() -> None:
    assert LambdaAttentionBackend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,)


class TestBlockSizes:
    def chosen(self, model_path: str, kernel: str, **arguments: Any) -> int:
        """The block size that vLLM's platform settles on, from an engine's arguments."""
        section = {"lminf": {"kernel": kernel, "n_local": 512}}
        config = EngineArgs(
            model=model_path, attention_backend="LMINF", additional_config=section, **arguments
        ).create_engine_config()
        if not config.cache_config.user_specified_block_size:
            return current_platform._preferred_block_size_for_backends(
                [LambdaAttentionBackend], CacheConfig.DEFAULT_BLOCK_SIZE, config
            )
        return config.cache_config.block_size

    def test_what_triton_takes(self) -> None:
        assert LambdaAttentionBackend.get_supported_kernel_block_sizes() == [MultipleOf(16)]

    @pytest.mark.parametrize("capability", DEVICES, indirect=True, ids=str)
    @pytest.mark.parametrize("kernel", ["auto", "triton"])
    def test_unless_one_is_named_a_block_holds_any_tile(
        self, capability: DeviceCapability, kernel: str, model_path: str
    ) -> None:
        block_size = self.chosen(model_path, kernel)
        hardware = Hardware(False, 10 * capability.major + capability.minor, 132, 227 * 1024)
        for dtype in (torch.bfloat16, torch.float32):
            for head_size in (16, 64, 128, 256):
                heads = Heads(8, 2, head_size, dtype)
                arguments = heads, LambdaPattern(100, 4096, 4096), dtype, hardware
                for plan in (prefill_plan(*arguments), decode_plan(*arguments, 16)):
                    assert block_size % plan.keys == 0
                    assert block_size % plan.global_keys == 0

    def test_a_size_that_was_named_stays(self, model_path: str) -> None:
        assert self.chosen(model_path, "auto", block_size=16) == 16

    def test_the_plain_kernel_has_no_tiles(self, model_path: str) -> None:
        assert self.chosen(model_path, "reference") == CacheConfig.DEFAULT_BLOCK_SIZE
