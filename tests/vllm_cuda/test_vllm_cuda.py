"""The plugin on vLLM for GPUs, as far as its Python files go: in a process that has them first.

Beside the tests in `within/`, those of layers, rotary modules, memory, metrics and the names that
the plugin stands on run there again.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "build" / "vllm-cuda"
TESTS = (
    "tests/vllm_cuda/within",
    "tests/plugin/backend/test_backend.py",
    "tests/plugin/backend/test_rotary.py",
    "tests/plugin/backend/test_loaded_model.py",
    "tests/plugin/backend/test_probe.py",
    "tests/plugin/kv_cache/test_manager.py",
    "tests/plugin/kv_cache/test_spec.py",
    "tests/plugin/kv_cache/test_archive.py",
    "tests/plugin/test_metrics.py",
    "tests/plugin/test_register.py::TestHooks",
)
ENGINES = ("tests/vllm_cuda/engine",)
"""In a process of their own: see `tests.vllm_cuda.worker`."""


def run(tests: tuple[str, ...], *more_plugins: str) -> None:
    if not (SOURCES / "vllm" / "__init__.py").is_file():
        pytest.fail(f"{SOURCES} holds no vLLM: run `make vllm-cuda` first")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{SOURCES}{os.pathsep}{ROOT}",
        "TRITON_INTERPRET": "1",
        # Without it vLLM looks for a device that Triton could use, and does without Triton.
        "CUDA_VISIBLE_DEVICES": "",
    }
    plugins = ("tests.vllm_cuda.stand_ins", *more_plugins, "no:cacheprovider")
    options = [option for name in plugins for option in ("-p", name)]
    command = [sys.executable, "-m", "pytest", "-q", *options, *tests]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_on_vllm_for_gpus() -> None:
    run(TESTS)


@pytest.mark.engine
def test_its_engine() -> None:
    """With its own scheduler, runner and sampler."""
    run(ENGINES, "tests.vllm_cuda.worker")
