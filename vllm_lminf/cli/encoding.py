"""Where a model's attention takes positions from, and what else it does, in a few words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ROPE_NAMES = {
    "default": "RoPE",
    "linear": "RoPE, linear scaling",
    "llama3": "RoPE, llama3 scaling",
    "yarn": "YaRN",
    "dynamic": "RoPE, dynamic NTK",
    "longrope": "LongRoPE",
}


def describe(
    config: Any, layers: Sequence[Any], rotary_dim: int | None, is_neox_style: bool
) -> str:
    """The encoding of a model.

    Args:
        config: its configuration, Hugging Face's.
        layers: its attention layers, vLLM's, with LMINF's implementation.
        rotary_dim: dimensions of a head that are rotated; None where that isn't known.
        is_neox_style: whether pairs are halves apart.
    """
    rules = layers[0].impl.rules
    if rules.alibi_slopes is not None:
        parts = ["ALiBi"]
    else:
        given = getattr(config, "rope_parameters", None) or {}
        per_type = [p for p in given.values() if isinstance(p, dict)] or [given]
        kinds = dict.fromkeys(p.get("rope_type", "default") for p in per_type)
        parts = [ROPE_NAMES.get(kind, f"RoPE, {kind}") for kind in kinds]
        if rotary_dim is not None and rotary_dim < layers[0].head_size:
            parts.append(f"on {rotary_dim} of {layers[0].head_size} dimensions")
        if not is_neox_style:
            parts.append("interleaved pairs")
    if windowed := sum(layer.sliding_window is not None for layer in layers):
        parts.append(f"own window kept in {windowed} of {len(layers)} layers")
    if rules.softcap is not None:
        parts.append("soft-capping")
    if rules.sinks is not None:
        parts.append("learned sinks")
    return "; ".join(parts)
