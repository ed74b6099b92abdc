"""What happens between the user's command and the first process: select, read, check, refuse."""

import os
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_lminf.errors import SettingsError, UnsupportedError
from vllm_lminf.kernels import registry
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import MAX_POSITION, LambdaPattern
from vllm_lminf.plugin import patches, speculation, trained_length, versions
from vllm_lminf.plugin.config import (
    BACKEND_NAME,
    BACKEND_VARIABLE,
    VARIABLE_PREFIX,
    LambdaConfig,
    Settings,
    given_settings,
    is_backend_name,
    is_near_miss,
    question_of_variables,
)
from vllm_lminf.plugin.layer_config import cache_dtype_of, layer_config_of

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
            logger.warning(
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
    settings = Settings.read(args.additional_config, os.environ, elsewhere)
    if settings.idle:
        logger.warning(
            "%s: set, and without effect, since middle_top_k is not: nothing is recalled",
            ", ".join(settings.idle),
        )
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


def check(config: "VllmConfig") -> None:
    """Refuses what an engine's configuration asks for and LMINF doesn't do, and completes it: what
    the settings come to is written into it, for all processes of the engine.

    Safe to repeat, for a copy too.

    Raises:
        SettingsError: the settings make no Λ with this model.
        UnsupportedError: the model or a feature isn't served.
    """
    settings = Settings.read(config.additional_config, os.environ)
    reasons = _model_reasons(config.model_config, "generate")
    if (draft := speculation.draft_model_of(config)) is not None:
        reasons += [f"the draft model: {reason}" for reason in _model_reasons(draft, "draft")]
    reasons += _feature_reasons(config)
    if settings.middle_top_k > 0:
        reasons += _middle_reasons(config, settings)
    trained = trained_length.of(speculation.target_of(config))
    try:
        resolved = LambdaConfig.resolve(settings, trained)
    except SettingsError as error:
        middle = Middle(1, 1, 1) if settings.middle_top_k > 0 else None
        reasons += _kernel_reasons(config, settings, LambdaPattern(1, 1, 1), middle)
        if not reasons:
            raise
        raise UnsupportedError(reasons + error.problems) from error
    reasons += _kernel_reasons(config, settings, resolved.pattern, resolved.middle)
    reasons += _window_reasons(config, resolved)
    if reasons:
        raise UnsupportedError(reasons)
    speculation.join(config)
    config.additional_config = resolved.added_to(config.additional_config)


def _window_reasons(config: "VllmConfig", resolved: LambdaConfig) -> list[str]:
    window = resolved.trained.window
    if (
        not config.model_config.disable_sliding_window
        or window is None
        or resolved.n_local <= window
    ):
        return []
    return [
        f"--disable-sliding-window, and n_local {resolved.n_local}: the model was trained with "
        f"windows of {window} tokens; leave n_local out, or set it to {window} or less"
    ]


def _model_reasons(model: "ModelConfig", runner_type: str) -> list[str]:
    reasons = []
    if model.runner_type != runner_type:
        reasons.append(f"runner {model.runner_type!r}: only text generation is served")
    if model.is_encoder_decoder:
        reasons.append("an encoder-decoder model: LM-Infinite is defined for decoders")
    layers = f"layers 0 to {model.get_total_num_hidden_layers() - 1}"
    if model.use_mla:
        reasons.append(
            f"{layers}: multi-head latent attention (MLA): its cache holds no keys to rotate back"
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
            f"--kv-cache-dtype {cache_dtype}: global keys are read back to be rotated, and no "
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


def _middle_reasons(config: "VllmConfig", settings: Settings) -> list[str]:
    """What doesn't go with a middle that is recalled."""
    model, first = config.model_config, settings.middle_from_layer
    reasons = []
    num_layers = model.get_total_num_hidden_layers()
    windows = trained_length.layers_with_windows(model, config.cache_config.sliding_window)
    if first > num_layers:
        reasons.append(
            f"middle_from_layer {first}: the model has {num_layers} layers; set it to {num_layers} "
            "or less"
        )
    elif windows.issuperset(range(first - 1, num_layers)):
        reasons.append(
            f"middle_from_layer {first}: from there on every layer has a sliding window of its "
            "own, which it keeps, and nothing would be recalled; set middle_top_k to 0"
            + (", or middle_from_layer lower" if len(windows) < num_layers else "")
        )
    if model.uses_alibi:
        reasons.append(
            "ALiBi: at which distance its bias counts the middle isn't settled; set middle_top_k "
            "to 0"
        )
    word = config.cache_config.cache_dtype
    dtype = cache_dtype_of(word, model.dtype)
    if dtype is not None and dtype.itemsize == 1:
        reasons.append(
            f"--kv-cache-dtype {word}: the archive keeps no keys and values of 8 bits; use auto"
        )
    drafter = config.speculative_config
    if drafter is not None and drafter.uses_draft_kv_cache():
        reasons.append(
            f"speculative decoding with method {drafter.method!r}: a drafter with a KV cache of "
            "its own recalls nothing; use ngram, or set middle_top_k to 0"
        )
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        reasons.append(
            "--disable-hybrid-kv-cache-manager: the archive's blocks are managed apart from the "
            "window's; drop it"
        )
    if config.parallel_config.use_ubatching:
        reasons.append(
            "microbatches (--enable-dbo, --ubatch-size): which of their rows look isn't told; drop "
            "them"
        )
    return [f"middle_top_k {settings.middle_top_k}, and {reason}" for reason in reasons]


def _kernel_reasons(
    config: "VllmConfig", settings: Settings, pattern: LambdaPattern, middle: Middle | None
) -> list[str]:
    """Why no kernel that was asked for can run. One that "auto" found begins to compile."""
    model, word = config.model_config, config.cache_config.cache_dtype
    if model.is_attention_free or cache_dtype_of(word, model.dtype) is None:
        return []  # told with the model, or with the features
    layer = layer_config_of(config, pattern, middle, settings.middle_index)
    is_automatic = settings.kernel == registry.AUTOMATIC
    choice = registry.choose(settings.kernel, layer, load=not is_automatic)
    if choice.kernel is not None:
        if is_automatic:
            registry.kernel_class(choice.kernel).start_loading(layer)
        return []
    named = "" if word == "auto" else f" with --kv-cache-dtype {word}"
    return [
        f"kernel {kernel!r}{named}: {reason}"
        for kernel, against in choice.against.items()
        for reason in against
    ]
