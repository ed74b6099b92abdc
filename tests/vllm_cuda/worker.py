"""A worker of vLLM for GPUs without one: vLLM's own runner, scheduler and sampler, over tensors of
the CPU's; Triton's kernels are interpreted, vLLM's as well as the plugin's.

A plugin of pytest, behind `stand_ins`, for processes in which nothing else is tested: what vLLM
brings to have its newer runner on CPUs changes torch's streams, events and pinned memory.
"""

from typing import Any

import torch

from tests.vllm_cuda.stand_ins import CudaWithoutDevice

CPU = torch.device("cpu")

# Asked while the modules below are imported, some of them.
CudaWithoutDevice.is_pin_memory_available = classmethod(lambda cls: False)
CudaWithoutDevice.get_current_memory_usage = classmethod(lambda cls, device=None: 0)
torch.accelerator.empty_host_cache = lambda: None

import vllm.v1.worker.cpu.shm  # noqa: E402, F401
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.model_executor.model_loader import get_model_loader  # noqa: E402
from vllm.model_executor.model_loader.utils import (  # noqa: E402
    initialize_model,
    process_weights_after_loading,
)
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402
from vllm.v1.worker.gpu import buffer_utils, warmup  # noqa: E402
from vllm.v1.worker.gpu_worker import (  # noqa: E402
    Worker,
    init_worker_distributed_environment,
)
from vllm.v1.worker.worker_base import CompilationTimes  # noqa: E402

# Buffers that host and device share are the host's, then.
buffer_utils.is_uva_available = lambda: True


class WorkerWithoutDevice(Worker):
    """Nothing is measured, compiled ahead or captured."""

    def init_device(self) -> None:
        self.device = CPU
        init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        self._init_workspace_and_model_runner()

    def load_model(self, **_: Any) -> None:
        config, runner = self.vllm_config, self.model_runner
        loader = get_model_loader(config.load_config)
        with set_current_vllm_config(config), runner.jit_warmup_registry.activate():
            with set_default_torch_dtype(self.model_config.dtype):
                model = initialize_model(vllm_config=config)
            loader.load_weights(model, self.model_config)
            process_weights_after_loading(model, self.model_config, CPU)
            runner.load_model(model=model.eval())

    def determine_available_memory(self) -> int:
        size = self.cache_config.kv_cache_memory_bytes
        assert size is not None
        return size

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """vLLM's made-up requests, through the scheduler's place."""
        steps = self.execute_model, self.sample_tokens
        warmup._warmup_kernels(self.model_runner, *steps, greedy=True)
        return CompilationTimes(language_model=0.0, encoder=0.0)
