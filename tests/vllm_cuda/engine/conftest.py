"""An engine of vLLM for GPUs, its model on the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM, ModelRegistry
from vllm.model_executor.models.llama import LlamaForCausalLM

from tests.engine.conftest import start_engine
from tests.engine.oracle_model import save_tiny_llama
from tests.engine.test_middle import settings
from vllm_lminf.middle import Middle
from vllm_lminf.plugin import register

MIDDLE = Middle(3, distance=30, rows=4, from_layer=2)
N_GLOBAL, N_LOCAL, BLOCK = 5, 16, 16
PAGES = 9
"""In the archive, one of them never used; vLLM's pool of blocks is much larger."""
PAGE_BYTES = 16 * (2 * 16 * 4 + 16 + 8) + 16 * 4
"""Of the one layer that recalls, with its one key head of 16."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "model", 2, 1, 16)


@pytest.fixture(scope="session")
def llm(model: Path) -> Iterator[LLM]:
    register()
    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
    native = {name: ["native"] for name in ("rms_norm", "fused_add_rms_norm")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
        patch.setenv("VLLM_HOST_IP", "127.0.0.1")
        patch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
        with start_engine(
            model,
            n_global=N_GLOBAL,
            n_local=N_LOCAL,
            kernel="triton",
            middle=settings(MIDDLE, archive_gib=PAGES * PAGE_BYTES / (1 << 30)),
            block_size=BLOCK,
            max_num_batched_tokens=48,
            max_model_len=80,
            max_num_seqs=3,
            kv_cache_memory_bytes=1 << 20,
            disable_log_stats=False,
            worker_cls="tests.vllm_cuda.worker.WorkerWithoutDevice",
            compilation_config={"custom_ops": ["none"]},
            kernel_config={"ir_op_priority": native},
        ) as llm:
            yield llm
