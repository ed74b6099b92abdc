"""What layers compile and load before vLLM says that it is ready.

vLLM's own warm-up sends a few short prompts through the model. It reaches neither the kernels for
longer ones, nor those for other numbers of requests; and where it is asked to, it ends an engine
that compiles anything later.
"""

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_lminf.plugin.layer_kernel import LayerKernel, scales_of


def warm_up(engine: VllmConfig) -> None:
    """Launches what the layers of an engine can launch, for requests without rows. Layers that are
    alike launch the same: one of them does it. Their caches are there by then."""
    scheduler = engine.scheduler_config
    # A draft model's first pass may see each request as two, see `LambdaMetadataBuilder`.
    max_requests = scheduler.max_num_seqs * (1 if engine.speculative_config is None else 2)
    seen = set()
    for layer in get_layers_from_vllm_config(engine, Attention).values():
        kernel = getattr(layer.impl, "kernel", None)
        if not isinstance(kernel, LayerKernel) or layer.kv_cache.numel() == 0:
            continue
        alike = kernel.compiled_for(layer.kv_cache)
        if alike not in seen:
            seen.add(alike)
            most = max_requests, scheduler.max_num_batched_tokens
            kernel.warm_up(layer.kv_cache, *most, scales_of(layer))
