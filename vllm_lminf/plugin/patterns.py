"""Which Λ a model and each of its layers computes, and which one a layer's KV cache is kept by."""

from functools import reduce

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import speculation, versions
from vllm_lminf.plugin.config import LambdaConfig


def model_pattern(config: VllmConfig) -> LambdaPattern:
    """The Λ of the model that is built under this configuration: the engine's, or a draft's."""
    pattern, model = LambdaConfig.of(config).pattern, config.model_config
    if not speculation.is_draft(model):
        return pattern
    return speculation.draft_pattern(pattern, versions.trained_lengths(model)[0])


def layer_pattern(pattern: LambdaPattern, own_window: int | None) -> LambdaPattern:
    """What a layer of a model under this Λ sees. A layer that the model gave a window of its own
    keeps that, which is a Λ without global tokens; only full attention becomes the model's Λ."""
    if own_window is None:
        return pattern
    return LambdaPattern(0, own_window, own_window)


def cache_pattern(engine: VllmConfig, own_window: int | None) -> LambdaPattern:
    """What a layer's KV cache keeps: what the layer sees.

    With disable_hybrid_kv_cache_manager all layers share one block table, which then keeps what
    any of them sees; each layer still looks at its own part alone. The layers of this process
    must all be built by then.
    """
    pattern = LambdaConfig.of(engine).pattern
    if not engine.scheduler_config.disable_hybrid_kv_cache_manager:
        return layer_pattern(pattern, own_window)
    layers = get_layers_from_vllm_config(engine, Attention).values()
    windows = {own_window, *(layer.sliding_window for layer in layers)}
    return reduce(LambdaPattern.union, (layer_pattern(pattern, window) for window in windows))
