"""What a checkpoint was trained on: as its own configuration says, whatever options say of it.

The default window follows from it, so an option that makes a model's configuration claim more
(``--hf-overrides``), or takes its sliding windows away (``--disable-sliding-window``), must not
widen it: the weights stay what they are. What is decided here, and why, is told with the start
line. Who knows better than the checkpoint's configuration sets n_local.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import versions
from vllm_lminf.plugin.config import Trained

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig


def of(model: "ModelConfig") -> Trained:
    """What an engine's model was trained on."""
    overridden = bool(model.hf_overrides)
    changed = overridden or model.disable_sliding_window
    own = versions.as_the_checkpoint_says(model) if changed else model
    length, longest = versions.trained_lengths(model)
    own_length, own_longest = versions.trained_lengths(own)
    is_default = _is_default(own)
    remarks = []
    if overridden and versions.rotation(model) != versions.rotation(own):
        if length != own_length:
            remarks.append(
                f"--hf-overrides changes the rotation: {length} tokens are taken for the trained "
                f"length, as it says; the checkpoint's own configuration says {own_length}"
            )
    elif own_length is not None and length is not None and own_length < length and not is_default:
        remarks.append(
            f"--hf-overrides says {length} tokens, and the checkpoint's own configuration says "
            f"{own_length} for the same rotation: {own_length} is taken for what it was trained "
            "on; if it was trained on more, set n_local"
        )
        length, longest = own_length, own_longest
    if is_default and length == own_length:
        remarks.append(
            f"the checkpoint's configuration doesn't say how long its context is: {length} is the "
            f"default of {type(own.hf_text_config).__name__}, which needn't be what it was trained "
            "on; set n_local to that"
        )
    taken = _windows_taken(own.hf_text_config, model.hf_text_config) if changed else None
    window = _window(model.hf_text_config)
    own_window = _window(own.hf_text_config)
    if taken is not None:
        option = "--disable-sliding-window" if model.disable_sliding_window else "--hf-overrides"
        remarks.append(
            f"{option} takes away sliding windows of {taken} tokens: that is what these layers "
            f"were trained on, and no more is taken for the trained length"
        )
        length = taken if length is None else min(length, taken)
        longest = taken if longest is None else min(longest, taken)
    elif window is not None and own_window is not None and window > own_window:
        remarks.append(
            f"--hf-overrides widens sliding windows from {own_window} tokens, which these layers "
            f"were trained with, to {window}"
        )
    return Trained(length, longest, taken, tuple(remarks))


def distances_beyond(
    trained: Trained, pattern: LambdaPattern, middle: Middle | None
) -> Iterator[str]:
    """What it means that a Λ, or what is recalled from its middle, scores distances that the model
    has not met in training, if it does; a sentence each."""
    if trained.longest is None:
        return
    if middle is not None and middle.distance > trained.longest:
        yield (
            f"middle_distance {middle.distance} is beyond the trained length, {trained.longest}: "
            "what is recalled is scored at a distance that the model has not met in training; "
            f"leave it out, or set it to {trained.longest} or less"
        )
    n_local, distance_limit = pattern.n_local, pattern.distance_limit
    if n_local > trained.longest:
        yield (
            f"n_local {n_local} is beyond the trained length, {trained.longest}: from that many "
            f"tokens on, and up to {n_local}, nothing keeps distances to those that the model has "
            "met in training, and its text falls apart as without LM-Infinite; leave n_local out, "
            f"or set it to {trained.longest} or less"
        )
    elif distance_limit > trained.longest:
        yield (
            f"distance_limit {distance_limit} is beyond the trained length, {trained.longest}: "
            "global tokens are scored at distances that the model has not met in training; leave "
            f"it out, or set it to {trained.longest} or less"
        )


def _is_default(own: "ModelConfig") -> bool:
    """Whether the length in a configuration is a default of its class, and no word of the
    checkpoint's. Classes read it under names of their own, so any number of that size counts."""
    said = versions.raw_config(own)
    length, key = own.model_arch_config.derived_max_model_len_and_key
    if said is None or key is None:
        return False
    return not any(name == key or value == length for name, value in _entries(said))


def _entries(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _entries(value)
        else:
            yield key, value


def _window(config: "PretrainedConfig") -> int | None:
    """Tokens of the sliding windows that a configuration gives to some layers or to all."""
    window = getattr(config, "sliding_window", None)
    return window or None if isinstance(window, int) else None


def _windows_taken(own: "PretrainedConfig", now: "PretrainedConfig") -> int | None:
    """Tokens of the windows of which a layer has one by its own configuration, and none now."""
    window = _window(own)
    if window is None:
        return None
    had, has = _layers_with_windows(own), _layers_with_windows(now)
    lost = any(i not in has for i in had) if _window(now) is not None else bool(had)
    return window if lost else None


def layers_with_windows(model: "ModelConfig", everywhere: int | None) -> set[int]:
    """Which layers have sliding windows, counted from 0, as far as a model's configuration tells.

    Args:
        model: the model.
        everywhere: tokens of the window that vLLM gives to every layer; None if to none, or to some
            alone.
    """
    if everywhere is not None:
        return set(range(model.get_total_num_hidden_layers()))
    config = model.hf_text_config
    has_types = getattr(config, "layer_types", None) is not None
    return _layers_with_windows(config) if has_types and _window(config) is not None else set()


def _layers_with_windows(config: "PretrainedConfig") -> set[int]:
    """Which layers have one, if any has: all where their types aren't listed."""
    types = getattr(config, "layer_types", None)
    if types is None:
        return set(range(config.num_hidden_layers))
    return {i for i, kind in enumerate(types) if "sliding" in str(kind)}
