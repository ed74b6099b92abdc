"""Engines of two worker processes, joined by gloo: the answers of one worker."""

import os
from pathlib import Path
from typing import Any

import pytest
from vllm.config import CompilationMode
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.worker.worker_base import WorkerBase

from tests.engine import drafters
from tests.engine.conftest import Engine, archive_manager
from tests.engine.drafters import TRAINED_LENGTH, save_counting_model
from tests.engine.test_exactness import random_prompts
from tests.engine.test_middle import settings
from tests.engine.test_speculative import assert_same
from tests.engine.traffic import Answer, ask, assert_equal_to_oracle
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin.archive_backend import Archive
from vllm_lminf.plugin.backend import LambdaAttentionImpl

pytestmark = pytest.mark.engine

PATTERN = LambdaPattern(10, TRAINED_LENGTH, TRAINED_LENGTH)
MAX_TOKENS = 40

# A pool of 30 blocks of 16 holds 480 tokens: the last prompt is three times as long, and all are
# answered beyond the trained length.
LENGTHS = [1, 65, 200, 1500]
ARGUMENTS: dict[str, Any] = {
    "n_global": 10,
    "block_size": 16,
    "num_gpu_blocks_override": 31,
    "max_num_batched_tokens": 96,
    "max_model_len": 10_000,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_counting_model(tmp_path_factory.mktemp("parallel") / "model")


@pytest.fixture(scope="class")
def one_worker(class_engine: Engine, model: Path) -> list[Answer]:
    with class_engine(model, **ARGUMENTS) as llm:
        answers = ask(llm, random_prompts(LENGTHS), MAX_TOKENS)
    assert_equal_to_oracle(model, answers[-2:], PATTERN)
    return answers


def layers_of(worker: WorkerBase) -> dict[str, LambdaPattern]:
    """Runs in a worker: its attention layers, and the Λ that each attends by."""
    layers = worker.model_runner.compilation_config.static_forward_context
    assert all(type(layer.impl) is LambdaAttentionImpl for layer in layers.values())
    return {name: layer.impl.pattern for name, layer in layers.items()}


PIPELINE: dict[str, Any] = {
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": CompilationMode.DYNAMO_TRACE_ONCE, "backend": "eager"},
}
MIDDLE = Middle(4, distance=30, rows=20, from_layer=2)


def archives_of(worker: WorkerBase) -> dict[str, int]:
    """Runs in a worker: the bytes of its archives."""
    layers = worker.model_runner.compilation_config.static_forward_context
    return {n: each.pages.nbytes for n, each in layers.items() if isinstance(each, Archive)}


TARGET_LAYERS = [f"model.layers.{layer}.self_attn.attn" for layer in range(2)]
DRAFT_LAYERS = [f"draft_model.{layer}" for layer in TARGET_LAYERS]


class TestTwoWorkers:
    @pytest.fixture(autouse=True)
    def one_core_each(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A worker's threads keep to the cores that it is given here."""
        cores = sorted(os.sched_getaffinity(0))
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")

    def run(
        self, engine: Engine, model: Path, **arguments: Any
    ) -> tuple[list[Answer], list[dict[str, LambdaPattern]]]:
        given = ARGUMENTS | {"distributed_executor_backend": "mp"} | arguments
        with engine(model, **given) as llm:
            assert isinstance(llm.llm_engine.model_executor, MultiprocExecutor)
            layers = llm.collective_rpc(layers_of)
            return ask(llm, random_prompts(LENGTHS), MAX_TOKENS), layers

    def test_tensor_parallel(
        self, class_engine: Engine, model: Path, one_worker: list[Answer]
    ) -> None:
        answers, layers = self.run(class_engine, model, tensor_parallel_size=2)
        assert layers == 2 * [dict.fromkeys(TARGET_LAYERS, PATTERN)]
        assert_same(answers, one_worker)

    def test_tensor_parallel_with_a_draft_model(
        self, class_engine: Engine, model: Path, one_worker: list[Answer]
    ) -> None:
        drafter = drafters.draft_model(model) | {"draft_tensor_parallel_size": 2}
        answers, layers = self.run(
            class_engine, model, tensor_parallel_size=2, speculative_config=drafter
        )
        assert layers == 2 * [dict.fromkeys(TARGET_LAYERS + DRAFT_LAYERS, PATTERN)]
        assert_same(answers, one_worker)

    def test_pipeline_parallel(
        self, class_engine: Engine, model: Path, one_worker: list[Answer]
    ) -> None:
        """vLLM's CPU worker makes the buffers between its stages while it warms the compiled model
        up: with enforce_eager it dies at the first step, with any backend."""
        answers, layers = self.run(class_engine, model, **PIPELINE)
        assert layers == [{name: PATTERN} for name in TARGET_LAYERS]
        assert_same(answers, one_worker)

    def test_the_middle(self, class_engine: Engine, model: Path) -> None:
        """The workers' archives have together what one worker's has; the first stage of a pipeline
        has none, since its layer recalls nothing."""
        middle, name = settings(MIDDLE), f"{TARGET_LAYERS[1]}.archive"
        with class_engine(model, middle=middle, **ARGUMENTS) as llm:
            expected = ask(llm, random_prompts(LENGTHS), MAX_TOKENS)
            (size,) = llm.collective_rpc(archives_of)[0].values()
            page = archive_manager(llm).kv_cache_spec.page_size_bytes
        assert_equal_to_oracle(model, expected[-2:], PATTERN, MIDDLE)
        for arguments, workers in (
            ({"tensor_parallel_size": 2}, [[name], [name]]),
            (PIPELINE, [[], [name]]),
        ):
            given = ARGUMENTS | {"distributed_executor_backend": "mp"} | arguments
            with class_engine(model, middle=middle, **given) as llm:
                archives = llm.collective_rpc(archives_of)
                answers = ask(llm, random_prompts(LENGTHS), MAX_TOKENS)
            assert_same(answers, expected)
            assert [[*each] for each in archives] == workers
            assert 0 <= size - sum(sum(each.values()) for each in archives) < page
