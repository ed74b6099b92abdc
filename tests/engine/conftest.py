"""Real vLLM engines, run inside the test's own process, so that a test can look into the pool."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models.transformers import base
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager

from vllm_lminf.plugin.archive import ArchiveManager

Engine = Callable[..., AbstractContextManager[LLM]]

# Triton decides when a kernel is defined whether it will be interpreted.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


@contextlib.contextmanager
def _classes_restored() -> Iterator[None]:
    """Where vLLM runs Hugging Face's code, it changes the decoder's class for its compiler; models
    that a test makes of that class without an engine can't be built then."""
    change = base.support_torch_compile
    before: dict[type, tuple[tuple[type, ...], dict[str, Any]]] = {}

    def change_and_remember(**arguments: Any) -> Callable[[type], type]:
        def decorate(cls: type) -> type:
            before.setdefault(cls, (cls.__bases__, dict(vars(cls))))
            changed: type = change(**arguments)(cls)
            return changed

        return decorate

    base.support_torch_compile = change_and_remember
    try:
        yield
    finally:
        base.support_torch_compile = change
        for cls, (bases, attributes) in before.items():
            for name in vars(cls).keys() - attributes.keys():
                delattr(cls, name)
            for name in attributes.keys() & {"__init__", "__call__"}:
                setattr(cls, name, attributes[name])
            cls.__bases__ = bases


@contextlib.contextmanager
def start_engine(
    model: Path,
    *,
    n_global: int | None = None,
    n_local: int | None = None,
    distance_limit: int | None = None,
    kernel: str | None = None,
    middle: dict[str, Any] | None = None,
    backend: str | None = "LMINF",
    **arguments: Any,
) -> Iterator[LLM]:
    """An engine in this process; see `engine`. ``middle`` holds the settings of that name."""
    given = {
        "n_global": n_global,
        "n_local": n_local,
        "distance_limit": distance_limit,
        "kernel": kernel,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    settings |= middle or {}
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 28,
    }
    # An engine in this process leaves variables of its own behind, one that fails to start too.
    environment = dict(os.environ)
    try:
        with _classes_restored():
            llm = LLM(
                str(model),
                attention_backend=backend,
                additional_config={"lminf": settings} if settings else {},
                **(defaults | arguments),
            )
            try:
                yield llm
            finally:
                llm.llm_engine.engine_core.shutdown()
                del llm
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()
        os.environ.clear()
        os.environ.update(environment)


def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
    return start_engine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """``with engine(path, n_local=.., **arguments of LLM) as llm``: LMINF in float32, eager."""
    return _in_this_process(monkeypatch)


@pytest.fixture(scope="class")
def class_engine() -> Iterator[Engine]:
    """The same, for an engine that the tests of a class share."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield _in_this_process(monkeypatch)


def kv_cache_manager(llm: LLM) -> KVCacheManager:
    """The scheduler's manager of an engine in this process."""
    manager: KVCacheManager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    return manager


def block_pool(llm: LLM) -> BlockPool:
    """The pool of an engine in this process."""
    return kv_cache_manager(llm).block_pool


def archive_manager(llm: LLM) -> ArchiveManager:
    """The manager of the archive's pages, in an engine that recalls the middle."""
    managers = kv_cache_manager(llm).coordinator.single_type_managers
    (manager,) = [each for each in managers if isinstance(each, ArchiveManager)]
    return manager
