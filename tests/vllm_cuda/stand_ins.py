"""What vLLM for GPUs looks for and doesn't find here: its compiled parts, and a GPU.

A plugin of pytest, for processes in which vLLM's Python files from `build/vllm-cuda` come first.
Each stand-in is named here, and there is no other.
"""

import sys
from types import ModuleType
from typing import ClassVar

import pytest
import torch
import vllm.platforms
from vllm.platforms.interface import DeviceCapability, Platform

from vllm_lminf.rope import rotate

COMPILED_MODULES = (
    "vllm._C",
    "vllm._C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa2_C",
)
"""Modules that register operators when they are imported; these register none."""

QUESTIONS = (
    "cutlass_group_gemm_supported",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp8",
)
"""Operators that tell what the compiled parts can do for a compute capability: nothing."""

_SILU = "silu_and_mul(Tensor! out, Tensor input) -> ()"
_ROTATION = (
    "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, "
    "Tensor cos_sin_cache, bool is_neox) -> ()"
)


def silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    """The operator between a Llama's two matrices."""
    gate, up = x.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    """The operator that turns heads."""
    cos, sin = cos_sin_cache[positions].chunk(2, dim=-1)
    for x in (query,) if key is None else (query, key):
        heads = x.view(len(positions), -1, head_size)
        heads.copy_(rotate(heads, cos, sin, is_neox))


for _name in COMPILED_MODULES:
    sys.modules[_name] = ModuleType(_name)

# Passes over compiled graphs name operators that only the compiled parts have. Graphs are cut here,
# and never compiled.
_passes = ModuleType("vllm.compilation.passes.pass_manager")
_passes.PostGradPassManager = object  # type: ignore[attr-defined]
sys.modules[_passes.__name__] = _passes

_operators = torch.library.Library("_C", "FRAGMENT")
for _name in QUESTIONS:
    _operators.define(f"{_name}(int capability) -> bool")
    _operators.impl(_name, lambda capability: False, "CompositeExplicitAutograd")

_operators.define(_SILU)
_operators.impl("silu_and_mul", silu_and_mul, "CPU")
_operators.define(_ROTATION)
_operators.impl("rotary_embedding", rotary_embedding, "CPU")
torch.library.register_fake("_C::rotary_embedding", lambda *_: None)

from vllm.platforms.cuda import NonNvmlCudaPlatform  # noqa: E402


class CudaWithoutDevice(NonNvmlCudaPlatform):
    """vLLM's platform for NVIDIA's devices, told what the device would have answered. vLLM's
    operators that are written in Python are registered for the tensors that there are."""

    dispatch_key = "CPU"
    capability: ClassVar[DeviceCapability] = DeviceCapability(9, 0)

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return cls.capability

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "a device that isn't there"


def choose_platform(platform: Platform) -> None:
    """Makes it vLLM's platform, which is otherwise found by looking for a device."""
    vllm.platforms._current_platform = platform


choose_platform(CudaWithoutDevice())


@pytest.fixture
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DeviceCapability:
    """The compute capability that the device would have answered; a parameter of the test."""
    answer = DeviceCapability(*request.param)
    monkeypatch.setattr(CudaWithoutDevice, "capability", answer)
    return answer
