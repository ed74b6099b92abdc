"""What vLLM keeps in private places, or in others from one version to the next: read here alone.

Nothing of vLLM is changed here but its list of known variables; what is wrapped stands in
`vllm_lminf.plugin.patches`. What would have to be public, and what to file:

- flash attention's place and version (`flash_attention`): vLLM's own backend looks there too. To
  file: give out-of-tree backends a function that returns the FlashAttention of this platform.
- the length that vLLM derives (`trained_lengths`). To file: make `_get_and_verify_max_len` public,
  or a property of `ModelConfig` that doesn't depend on what the user asked for.
- a checkpoint's own configuration, without overrides (`as_the_checkpoint_says`, `raw_config`). To
  file: let `ModelConfig` keep the configuration that it read beside the one that it overrode.
- the list of variables that vLLM knows (`declare_variables`). To file: let plugins declare
  variables, so that VLLM_* of theirs are neither warned of nor refused.
- `lora_manager`, which vLLM sets on a model (`leave_adapters_out`). To file: run a model without
  adapters by a setting of `set_forward_context`.
- where a pool is planned, and in how many steps (`plan_pools`), which differs between versions. To
  file: let a plan be asked for by an engine's configuration and its layers' caches alone.
- that `VllmJitKernel` counts keys (`register_warm_up`). To file: let a backend name a function to
  be run once caches are there, before graphs are captured.
"""

import copy
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import huggingface_hub
import torch
import vllm.envs
from vllm.config import ModelConfig, VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


def declare_variables(names: list[str]) -> None:
    """Makes environment variables known to vLLM, which warns of any other that starts as its own
    do, and refuses to start over them where it is asked to be strict."""
    for name in names:
        vllm.envs.environment_variables.setdefault(name, lambda name=name: os.environ.get(name))


def leave_adapters_out(model: torch.nn.Module, num_tokens: int) -> None:
    """Tells a model's LoRA layers, if it has any, that the tokens of its next run use no adapter.

    vLLM's runners do so before every run; a model that is run without them must not find what was
    left by none.
    """
    manager = getattr(model, "lora_manager", None)
    if manager is not None:
        from vllm.lora.layers import LoRAMapping

        none = (0,) * num_tokens
        manager.set_adapter_mapping(LoRAMapping(none, none, is_prefill=True))


def register_warm_up(engine: VllmConfig, warm_up: Callable[[VllmConfig], None]) -> None:
    """Has vLLM call ``warm_up(engine)`` once caches are there, before it captures graphs and says
    that it is ready. Called while a model is being loaded; once for an engine, however often.

    It is vLLM's registry of what compiles at run time, which wants for each kernel the keys that it
    is compiled by. Ours are known to the kernels; to vLLM an engine is one key. With
    --enforce-eager vLLM warms up nothing.
    """
    from vllm.model_executor.warmup.jit_warmup import VllmJitKernel

    class WarmUp(VllmJitKernel[int]):
        def __hash__(self) -> int:
            return hash((WarmUp.__qualname__, id(engine)))

        def __eq__(self, other: object) -> bool:
            return hash(self) == hash(other)

        def get_warmup_keys(self) -> list[int]:
            return [0]

        def compile(self, compile_key: int) -> None:
            warm_up(engine)

    WarmUp().register_warmup()


def plan_pools(
    config: VllmConfig, specs: list[dict[str, KVCacheSpec]], memory: list[int]
) -> list[KVCacheConfig]:
    """vLLM's plan of the pool of every worker, as its engine makes it once the models are there.

    Args:
        config: the engine's.
        specs: of every worker, the caches of its layers.
        memory: of every worker, in bytes.

    Raises:
        ValueError: the memory is too small for the longest sequence.
    """
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.v1.attention.backends import utils

    backends = get_current_attn_backends(config)
    layouts = [layout.name for layout in utils.get_supported_kv_cache_layouts(backends)]
    utils.resolve_kv_cache_layout(
        config, [layouts] * len(specs), [spec for each in specs for spec in each.values()]
    )
    try:
        planning: Any = importlib.import_module("vllm.v1.core.kv_cache_planning")
    except ModuleNotFoundError:
        planning = importlib.import_module("vllm.v1.core.kv_cache_utils")
    of_all_workers = getattr(planning, "get_global_kv_cache_groups", None)
    groups = () if of_all_workers is None else (of_all_workers(config, specs),)
    pools: list[KVCacheConfig] = planning.get_kv_cache_configs(config, specs, memory, *groups)
    return pools


def reasons_against_flash_attention() -> list[str]:
    """Why the FlashAttention that vLLM ships can't be had here; empty where it can."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return ["vLLM ships it for NVIDIA's devices alone"]
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return [f"it isn't part of this vLLM ({error})"]
    return []


def flash_attention(head_size: int) -> Callable[..., Any]:
    """FlashAttention as vLLM ships it, in the version that vLLM takes for such heads here."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    version = get_flash_attn_version(head_size=head_size)
    return functools.partial(flash_attn_varlen_func, fa_version=version)


def trained_lengths(model_config: ModelConfig) -> tuple[int | None, int | None]:
    """Tokens of context that the checkpoint was trained for, as this configuration has it, and the
    longest that the rotation was made for, which differs for LongRoPE alone: its long factors serve
    beyond the original length. None where the configuration is silent; `trained_length` looks
    behind it.

    It is the max_model_len that vLLM derives where the user gives none, without looking at the
    tokenizer, whose limit is no property of the weights. Dynamic NTK is the exception: it changes
    the rotation past the trained length, which vLLM counts in and LMINF never does.
    """
    from vllm.config.model import _get_and_verify_max_len
    from vllm.transformers_utils.config import iter_rope_parameters

    length, _ = model_config.model_arch_config.derived_max_model_len_and_key
    if length == float("inf"):
        return None, None
    rope = getattr(model_config.hf_text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        trained = int(rope.get("max_trained_positions", length))
        return trained, trained
    derived = _get_and_verify_max_len(
        hf_config=model_config.hf_text_config,
        model_arch_config=model_config.model_arch_config,
        tokenizer_config=None,
        max_model_len=None,
        disable_sliding_window=False,
        sliding_window=None,
    )
    kinds = {each["rope_type"] for each in iter_rope_parameters(model_config.hf_text_config)}
    return derived, max(derived, int(length)) if "longrope" in kinds else derived


def as_the_checkpoint_says(model_config: ModelConfig) -> ModelConfig:
    """The same model, its configuration read again, without what options change of it. Good for
    questions about lengths, windows and rotation."""
    from vllm.transformers_utils.config import get_config, get_hf_text_config

    own = copy.copy(model_config)
    own.hf_config = get_config(
        model_config.hf_config_path or model_config.model,
        model_config.trust_remote_code,
        model_config._hf_config_revision or model_config.revision,
        model_config.code_revision,
        model_config.config_format,
        token=model_config.hf_token,
    )
    own.hf_text_config = get_hf_text_config(own.hf_config)
    own.model_arch_config = own.get_model_arch_config()
    return own


def raw_config(model_config: ModelConfig) -> dict[str, Any] | None:
    """What stands in the checkpoint's config.json; None where it has none."""
    from transformers import PretrainedConfig

    try:
        said, _ = PretrainedConfig.get_config_dict(
            model_config.hf_config_path or model_config.model,
            revision=model_config._hf_config_revision or model_config.revision,
            token=model_config.hf_token,
            local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE,
        )
    except OSError:
        return None
    return dict(said)


def rotation(model_config: ModelConfig) -> list[dict[str, Any]]:
    """The parameters of the model's RoPE, for comparison."""
    from vllm.transformers_utils.config import iter_rope_parameters

    return list(iter_rope_parameters(model_config.hf_text_config))
