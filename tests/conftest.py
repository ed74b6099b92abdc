"""What tests of every kind share."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Several processes that test share the cores: threads that have nothing to do sleep, rather than
# spin on a core that another process needs, and no engine binds its threads to cores that another
# has bound its own to.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

_MODEL = Path(__file__).parents[1] / "build" / "models" / "SmolLM2-135M-Instruct"


_LONG = (
    "tests/kernels/triton/test_interpreted.py",
    "tests/kernels/triton/test_compiled.py",
    "tests/kernels/cpu/test_variants.py",
    "tests/vllm_cuda/test_vllm_cuda.py",
    "tests/engine/",
    "tests/server/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first: of several processes none is left with it in the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))


@pytest.fixture(scope="session")
def model_path() -> str:
    """A small trained LLaMA-style model: 30 layers, trained on 8192 tokens of context."""
    if not (_MODEL / "config.json").is_file():
        pytest.fail(f"{_MODEL} holds no model: run `make model` first")
    return str(_MODEL)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What LMINF says in the log meanwhile.

    By a filter, because the first engine of a process sets vLLM's logging up: that takes handlers
    off, pytest's among them, and lets no record pass on to the root.
    """
    sentences: list[str] = []

    def listen(record: logging.LogRecord) -> bool:
        sentences.append(record.getMessage())
        return True

    logger = logging.getLogger("vllm.lminf")
    logger.addFilter(listen)
    yield sentences
    logger.removeFilter(listen)


@pytest.fixture(scope="session")
def stock_config(model_path: str) -> "VllmConfig":
    """An engine's configuration in which LMINF isn't selected. Not to be changed."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=model_path).create_engine_config()
