"""Speculative decoding: which drafters are served, and how a draft model joins the engine.

A draft never decides a token: the model verifies each one, so a drafter can cost speed and nothing
else. What it must not do is to read or keep other blocks than the engine's Λ does.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin.config import BACKEND_NAME

if TYPE_CHECKING:
    from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig

SERVED = ("ngram", "draft_model", "eagle", "medusa")

_UNSERVED = {
    "custom_class": "what it reads and keeps isn't known",
    "dflash": "its drafts see each other, and the Λ looks back only",
    "dspark": "its drafts see each other, and the Λ looks back only",
    "eagle3": "a head over several layers' hidden states hasn't been tested under the Λ",
    "extract_hidden_states": "it stores hidden states in blocks that are freed as the window moves",
    "mlp_speculator": "vLLM's engine doesn't run it",
    "mtp": "heads of this kind haven't been tested under the Λ",
    "ngram_gpu": "it hasn't been tested under the Λ; ngram drafts the same",
    "suffix": "it needs arctic-inference, a vLLM plugin of its own, and hasn't been tested with it",
}


def target_of(config: "VllmConfig") -> "ModelConfig":
    """The model that verifies; while a draft model is built, vLLM's configuration names that."""
    drafter = config.speculative_config
    if drafter is not None and is_draft(config.model_config):
        return drafter.target_model_config
    return config.model_config


def draft_model_of(config: "VllmConfig") -> "ModelConfig | None":
    """The draft model, where a whole model drafts."""
    drafter = config.speculative_config
    if drafter is None or not drafter.uses_draft_model():
        return None
    return drafter.draft_model_config


def is_draft(model: "ModelConfig") -> bool:
    """Whether this is the configuration of a draft model."""
    return model.runner_type == "draft"


def draft_pattern(pattern: LambdaPattern, trained_length: int | None) -> LambdaPattern:
    """The Λ that a draft model attends by: the engine's, cut to what the draft was trained on.

    It never reaches further back than the engine's, so it reads no block that was freed.

    Example: an engine with n_local 8192 and a draft trained on 2048 tokens: the draft's window is
    2048 tokens.

    Args:
        pattern: the engine's.
        trained_length: the draft's; None if its configuration doesn't tell.
    """
    if trained_length is None:
        return pattern
    return replace(
        pattern,
        n_local=min(pattern.n_local, trained_length),
        distance_limit=min(pattern.distance_limit, trained_length),
    )


def reasons_against(config: "VllmConfig") -> list[str]:
    """Why this engine's drafter isn't served; empty when it is, or when there is none."""
    drafter = config.speculative_config
    if drafter is None:
        return []
    if drafter.method not in SERVED:
        why = _UNSERVED.get(drafter.method, "it isn't known")
        return [
            f"speculative decoding with method {drafter.method!r}: {why}; served are "
            f"{', '.join(SERVED)}"
        ]
    reasons = []
    if drafter.parallel_drafting:
        reasons.append(
            "speculative decoding with parallel_drafting: its placeholder tokens haven't been "
            "tested under the Λ; drop it"
        )
    named = drafter.attention_backend
    if drafter.uses_draft_kv_cache() and named is not None and named.name != BACKEND_NAME:
        reasons.append(
            f"speculative decoding with attention_backend {named.name}: the drafter's cache is in "
            f"the same blocks as the model's, which only {BACKEND_NAME} reads rightly; drop it"
        )
    return reasons


def lengthen(drafter: "SpeculativeConfig | None") -> None:
    """Lets a drafter serve sequences as long as the model's, however long it was trained for.

    vLLM would end drafting for the whole batch where one sequence outgrows the drafter's trained
    length or, from 0.33 on, refuse longer sequences altogether; the Λ needs neither.
    """
    if drafter is None or drafter.draft_model_config is None or drafter.max_model_len is not None:
        return
    drafter.draft_model_config.max_model_len = drafter.target_model_config.max_model_len


def join(config: "VllmConfig") -> None:
    """Gives a drafter the engine's backend; vLLM chooses one for it by itself."""
    drafter = config.speculative_config
    if drafter is not None and drafter.uses_draft_kv_cache():
        drafter.attention_backend = config.attention_config.backend
