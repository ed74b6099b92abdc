"""What happens between the user's command and the first process: select, read, check, refuse."""

import os
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from vllm_lminf.errors import BuildError, SettingsError, UnsupportedError
from vllm_lminf.kernels.base import Heads, Situation
from vllm_lminf.kernels.cpu import build
from vllm_lminf.pattern import MAX_POSITION, LambdaPattern
from vllm_lminf.plugin import patches, speculation, trained_length, versions
from vllm_lminf.plugin.config import (
    BACKEND_NAME,
    BACKEND_VARIABLE,
    SECTION,
    VARIABLE_PREFIX,
    Settings,
    given_settings,
    is_backend_name,
    is_near_miss,
    question_of_variables,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs


logger = init_logger("vllm.lminf")


def prepare(args: "EngineArgs") -> patches.Finish | None:
    """Called before an engine's configuration is built from its arguments.

    Returns:
        None when LMINF isn't selected; otherwise the check to run on the finished configuration.

    Raises:
        UnsupportedError: the variable and the arguments contradict each other.
        SettingsError: the settings can't be honoured, whatever the model.
    """
    if not _select(args):
        if places := given_settings(args.additional_config, os.environ):
            logger.warning_once(
                "%s: set, and %s isn't selected, so nothing reads it. To select it: %s=%s",
                ", ".join(places),
                BACKEND_NAME,
                BACKEND_VARIABLE,
                BACKEND_NAME,
            )
        return None
    versions.declare_variables(
        [name for name in os.environ if name.startswith(VARIABLE_PREFIX)]
        + [BACKEND_VARIABLE] * (BACKEND_VARIABLE in os.environ)
    )
    elsewhere = {
        "--hf-overrides": args.hf_overrides,
        "--model-loader-extra-config": args.model_loader_extra_config,
    }
    Settings.read(args.additional_config, os.environ, elsewhere)
    return check


def _select(args: "EngineArgs") -> bool:
    """Whether LMINF is selected; if so, the arguments are made to say it in vLLM's terms."""
    member = patches.backend_member()
    known = type(member).__members__
    if question := question_of_variables(os.environ, known):
        raise UnsupportedError([question])
    chosen = args.attention_backend
    if chosen is None or str(chosen).lower() == "auto":
        chosen = args.attention_config.backend
    if member in args.attention_config.backend_per_kind.values():
        raise UnsupportedError(
            [
                f"attention_config.backend_per_kind names {BACKEND_NAME}: it serves all layers of "
                f"a model or none; use --attention-backend {BACKEND_NAME}"
            ]
        )
    name = chosen.name if isinstance(chosen, type(member)) else str(chosen).upper()
    if is_backend_name(name):
        name = BACKEND_NAME
        if args.attention_backend is not None:
            args.attention_backend = member
    elif name not in known and is_near_miss(name):
        raise UnsupportedError([f"--attention-backend is {chosen!r}: was {BACKEND_NAME} meant?"])
    if not is_backend_name(os.environ.get(BACKEND_VARIABLE, "")):
        return name == BACKEND_NAME
    if chosen is None:
        args.attention_backend = member
    elif name != BACKEND_NAME:
        raise UnsupportedError(
            [
                f"{BACKEND_VARIABLE} is {BACKEND_NAME} and --attention-backend is {name}: they "
                "contradict each other; keep one"
            ]
        )
    return True


def pattern_of(config: "VllmConfig") -> LambdaPattern:
    """The Λ of an engine. The same in all its processes: they share arguments and environment."""
    settings = Settings.read(config.additional_config, os.environ)
    return settings.pattern(trained_length.of(speculation.target_of(config)).length)


def kernel_of(config: "VllmConfig") -> str:
    """The kernel that the user asked for: one of `vllm_lminf.plugin.config.KERNELS`."""
    return Settings.read(config.additional_config, os.environ).kernel


def pattern_being_built(config: "VllmConfig") -> LambdaPattern:
    """The Λ of the model that is built under this configuration: the engine's, or a draft's."""
    model = config.model_config
    if not speculation.is_draft(model):
        return pattern_of(config)
    return speculation.draft_pattern(pattern_of(config), versions.trained_length(model))


def check(config: "VllmConfig") -> None:
    """Refuses what an engine's configuration asks for and LMINF doesn't do, and completes it.

    Raises:
        SettingsError: the settings make no Λ with this model.
        UnsupportedError: the model or a feature isn't served.
    """
    reasons = [
        *_model_reasons(config.model_config, "generate"),
        *_draft_model_reasons(config),
        *_feature_reasons(config),
        *_kernel_reasons(config),
    ]
    try:
        pattern = pattern_of(config)
    except SettingsError as error:
        if not reasons:
            raise
        reasons += error.problems
    else:
        reasons += _window_reasons(config, pattern)
    if reasons:
        raise UnsupportedError(reasons)
    speculation.join(config)
    record_settings(config)


def record_settings(config: "VllmConfig") -> None:
    """Writes what the settings came to into the configuration, as if the user had named them all.

    vLLM keys its cache of compiled models by the configuration, and by variables of the environment
    that the process which compiles has declared: ours are none of them there. What is compiled
    depends on them by LongRoPE's magnitude, which goes by the distance limit.
    """
    if isinstance(config.additional_config, dict):
        given = config.additional_config.get(SECTION, {})
        section = {**given, **vars(pattern_of(config)), "kernel": kernel_of(config)}
        config.additional_config = {**config.additional_config, SECTION: section}


def _window_reasons(config: "VllmConfig", pattern: LambdaPattern) -> list[str]:
    window = trained_length.of(config.model_config).window
    if not config.model_config.disable_sliding_window or window is None:
        return []
    if pattern.n_local <= window:
        return []
    return [
        f"--disable-sliding-window, and n_local {pattern.n_local}: the model was trained with "
        f"windows of {window} tokens; leave n_local out, or set it to {window} or less"
    ]


def _draft_model_reasons(config: "VllmConfig") -> list[str]:
    draft = speculation.draft_model_of(config)
    if draft is None:
        return []
    return [f"the draft model: {reason}" for reason in _model_reasons(draft, "draft")]


def _model_reasons(model: "ModelConfig", runner_type: str) -> list[str]:
    reasons = []
    if model.runner_type != runner_type:
        reasons.append(f"runner {model.runner_type!r}: only text generation is served")
    if model.is_encoder_decoder:
        reasons.append("an encoder-decoder model: LM-Infinite is defined for decoders")
    layers = f"layers 0 to {model.get_total_num_hidden_layers() - 1}"
    if model.use_mla:
        reasons.append(
            f"{layers}: multi-head latent attention (MLA): its cache holds no keys to turn back"
        )
    if model.uses_mrope:
        reasons.append(f"{layers}: M-RoPE: a multimodal position is no single distance")
    if getattr(model.hf_text_config, "dual_chunk_attention_config", None) is not None:
        reasons.append(
            f"{layers}: dual chunk attention: it scores distances of its own choice, chunk by chunk"
        )
    if model.multimodal_config is not None and not model.multimodal_config.language_model_only:
        reasons.append(
            "images, audio, video: never tested; --language-model-only serves a model's text alone"
        )
    if model.is_attention_free or model.is_hybrid:
        reasons.append("state-space layers (Mamba and the like): they have no window")
    if model.max_model_len > MAX_POSITION:
        reasons.append(
            f"max_model_len {model.max_model_len}: positions are exact up to {MAX_POSITION}"
        )
    return reasons


def _feature_reasons(config: "VllmConfig") -> list[str]:
    reasons = []
    cache_dtype = config.cache_config.cache_dtype
    if cache_dtype_of(cache_dtype, config.model_config.dtype) is None:
        reasons.append(
            f"--kv-cache-dtype {cache_dtype}: global keys are read back to be turned, and no "
            "kernel reads this; use auto, or fp8 on a GPU"
        )
    reasons += speculation.reasons_against(config)
    if config.kv_transfer_config is not None:
        reasons.append(
            f"a KV connector ({config.kv_transfer_config.kv_connector}, from --kv-transfer-config "
            "or --kv-offloading-size): it moves blocks by position, and a Λ has gaps between them"
        )
    if config.model_config.enable_sleep_mode:
        reasons.append(
            "--enable-sleep-mode: that what LMINF keeps on a device survives it was never tested"
        )
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        reasons.append("context parallelism: a window isn't sharded over ranks")
    return reasons


def _kernel_reasons(config: "VllmConfig") -> list[str]:
    """Why no kernel that was asked for can run. Where the compiled one is likely to, it starts to
    compile."""
    from vllm_lminf.kernels.registry import choose

    try:
        asked = kernel_of(config)
    except SettingsError:
        return []  # told with all other settings
    try:
        pattern = pattern_of(config)
    except SettingsError:
        pattern = LambdaPattern(1, 1, 1)  # likewise
    model = config.model_config
    if (
        model.is_attention_free
        or cache_dtype_of(config.cache_config.cache_dtype, model.dtype) is None
    ):
        return []  # told with the model, or with the features
    choice = choose(asked, situation_of(config, pattern))
    word = config.cache_config.cache_dtype
    named = "" if word == "auto" else f" with --kv-cache-dtype {word}"
    reasons = [
        f"kernel {kernel!r}{named}: {reason}"
        for kernel, against in choice.against.items()
        for reason in against
    ]
    if asked in ("flash", "hybrid"):
        absent = versions.reasons_against_flash_attention()
        return reasons + [f"kernel {asked!r}{named}: {reason}" for reason in absent]
    dtype = str(model.dtype).removeprefix("torch.")
    if asked == "cpu":
        try:
            build.load_library(dtype)
        except BuildError as error:
            reasons.append(f"kernel 'cpu'{named}: {error}")
        return reasons
    if choice.kernel == "cpu":
        build.start(dtype)
    return reasons if choice.kernel is None else []


def cache_dtype_of(word: str, model_dtype: torch.dtype) -> torch.dtype | None:
    """What --kv-cache-dtype says, as a dtype; None for what no kernel of ours reads."""
    from vllm.platforms import current_platform

    if word == "auto":
        return model_dtype
    if word in ("fp8", "fp8_e4m3"):
        dtype: torch.dtype = current_platform.fp8_dtype()  # some AMD devices have another one
        return dtype
    known = {
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "fp8_e5m2": torch.float8_e5m2,
    }
    return known.get(word)


def situation_of(config: "VllmConfig", pattern: LambdaPattern) -> Situation:
    """Where the layers of an engine's model will run, as far as its configuration tells.

    What it doesn't tell is assumed to suit: each layer looks again, once it is there.
    """
    from vllm.platforms import current_platform

    model, parallel = config.model_config, config.parallel_config
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    text = model.hf_text_config
    return Situation(
        device_type=config.device_config.device_type,
        capability=None if capability is None else (capability.major, capability.minor),
        heads=Heads(
            model.get_num_attention_heads(parallel),
            model.get_num_kv_heads(parallel),
            model.get_head_size(),
            model.dtype,
        ),
        pattern=pattern,
        cache_dtype=cache_dtype_of(config.cache_config.cache_dtype, model.dtype) or model.dtype,
        block_size=config.cache_config.block_size or ANY_BLOCK_SIZE,
        has_rotation=not model.uses_alibi,
        has_alibi=bool(model.uses_alibi),
        has_softcap=bool(getattr(text, "attn_logit_softcapping", None)),
    )


ANY_BLOCK_SIZE = 16
"""Stands for one that vLLM is still to choose, among those that the kernel takes."""
