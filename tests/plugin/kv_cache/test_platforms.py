"""One manager for every platform and model runner: shown as far as a machine without a GPU can.

`tests.engine.test_hybrid` compares what the two runners ask of a real model.
"""

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability, Platform
from vllm.v1.attention.selector import AttentionSelectorConfig

import vllm_lminf.pattern
import vllm_lminf.plugin.kv_cache
from vllm_lminf.plugin import patches

MODULES = [vllm_lminf.plugin.kv_cache.__file__, vllm_lminf.pattern.__file__]


@pytest.fixture(params=["cpu", "cuda"])
def platform(request: pytest.FixtureRequest) -> Iterator[type[Platform]]:
    """vLLM's platform. CUDA's loads compiled operators, which a build for CPUs lacks and nothing
    here calls; and it asks the device what it is capable of, which is told instead."""
    if request.param == "cpu":
        yield CpuPlatform
        return
    with pytest.MonkeyPatch.context() as patch:
        operators = "vllm._C_stable_libtorch"
        patch.setitem(sys.modules, operators, sys.modules.get(operators, ModuleType(operators)))
        cuda = importlib.import_module("vllm.platforms.cuda").NonNvmlCudaPlatform
        capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        patch.setattr(cuda, "get_device_capability", capability)
        yield cuda


@pytest.mark.parametrize("path", MODULES, ids=lambda path: Path(path).name)
def test_knows_no_device(path: str | Path) -> None:
    """The memory's side imports neither tensors, nor a platform, nor a worker."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
    for name in imported:
        assert name
        assert not name.startswith(("torch", "vllm.platforms", "vllm.v1.worker")), name


def test_every_platform_gives_the_same_backend(platform: type[Platform]) -> None:
    """And so the same spec, by which vLLM finds the manager."""
    member = patches.backend_member()
    config = AttentionSelectorConfig(64, torch.bfloat16, "auto", 16)
    assert platform.get_attn_backend_cls(member, config) == member.get_path()


def test_no_platform_registers_caches_of_its_own(platform: type[Platform]) -> None:
    own = platform.register_custom_kv_cache_specs.__func__
    assert own is Platform.register_custom_kv_cache_specs.__func__
    assert platform.support_hybrid_kv_cache()
