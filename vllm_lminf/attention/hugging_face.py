"""Models that vLLM runs in Hugging Face's code: their rotation, found and made exact.

vLLM puts its attention layers into Hugging Face's attention modules and leaves what is around them
as it is. One rotary module beside the decoder's layers hands cosines and sines to all of them.
"""

import gc
import sys
import weakref
from typing import Any

import torch
from torch import nn

from vllm_lminf.rope import RotarySpec, RotationTables, rotate
from vllm_lminf.startup import UnsupportedError

MODEL_TYPES = ("glm", "gpt_neox", "olmo2", "phi")
"""Model types that are known to rotate in every layer, and in all layers alike."""

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class ExactPositionEmbeddings(nn.Module):
    """Takes the place of Hugging Face's rotary module: same angles, exact at any position."""

    def __init__(self, spec: RotarySpec, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.tables = RotationTables(spec.inv_freq, device)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines at ``position_ids``, integers [1, num_tokens].

        Returns:
            Two tensors of shape [1, num_tokens, rotary_dim], the second half a copy of the first,
            in x's dtype.
        """
        angles = self.tables(position_ids.flatten())
        cos, sin = ((a * self.spec.magnitude).repeat(1, 2)[None].to(x.dtype) for a in angles)
        return cos, sin


def is_hugging_face(attention: nn.Module) -> bool:
    """Whether the module around an attention layer is Hugging Face's, or a model's own in it."""
    return type(attention).__module__.startswith(("transformers.", "transformers_modules."))


def make_exact(attention: Any, layer_name: str, device: torch.device) -> ExactPositionEmbeddings:
    """Replaces the rotary module of the decoder around an attention module by an exact one, once.

    Args:
        attention: Hugging Face's module that holds the attention layer.
        layer_name: the layer's name, for messages.
        device: where the model is.

    Returns:
        The exact module; the same one for every layer of the decoder.

    Raises:
        UnsupportedError: the model, or its rotation, isn't served.
    """
    model_type = attention.config.model_type
    if model_type not in MODEL_TYPES:
        raise UnsupportedError(
            [
                f"layer {layer_name}: vLLM runs this model ({model_type}) in Hugging Face's code, "
                f"whose rotation is known for {', '.join(MODEL_TYPES)} alone"
            ]
        )
    decoder = _decoder_around(attention, layer_name)
    if not isinstance(decoder.rotary_emb, ExactPositionEmbeddings):
        spec = _read_spec(decoder.rotary_emb, attention, layer_name)
        decoder.rotary_emb = ExactPositionEmbeddings(spec, device)
    exact: ExactPositionEmbeddings = decoder.rotary_emb
    return exact


_decoders: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _decoder_around(attention: nn.Module, layer_name: str) -> Any:
    """The module that has the rotary module, and this attention module somewhere within.

    A module doesn't know what it is part of, and vLLM tells nobody when it has put a model
    together: it is looked for among all modules that exist, once for a model.
    """
    for decoder in _decoders:
        if attention in decoder.modules():
            return decoder
    for candidate in gc.get_objects():
        if (
            issubclass(type(candidate), nn.Module)
            and "rotary_emb" in candidate.__dict__.get("_modules", ())
            and attention in candidate.modules()
        ):
            _decoders.add(candidate)
            return candidate
    raise UnsupportedError(
        [f"layer {layer_name}: no rotary module in the modules around {type(attention).__name__}"]
    )


def _read_spec(rotary: Any, attention: nn.Module, layer_name: str) -> RotarySpec:
    kind = getattr(rotary, "rope_type", None)
    if kind not in _ROPE_TYPES:
        raise UnsupportedError([f"layer {layer_name}: rotary embedding {kind!r} is not served"])
    inv_freq = rotary.inv_freq.to("cpu", torch.float64)
    turn = sys.modules[type(attention).__module__].__dict__["apply_rotary_pos_emb"]
    with torch.device("cpu"):
        angles = torch.linspace(0.1, 3.0, inv_freq.numel())
        probe = torch.linspace(-1.0, 2.0, 2 * inv_freq.numel()).view(1, 1, 1, -1)
        cos, sin = (x.repeat(2).view(1, 1, -1) for x in (angles.cos(), angles.sin()))
        turned, _ = turn(probe, probe, cos, sin)
        for is_neox_style in (True, False):
            expected = rotate(probe, angles.cos(), angles.sin(), is_neox_style)
            if torch.allclose(turned, expected, atol=1e-5):
                return RotarySpec(inv_freq, is_neox_style, float(rotary.attention_scaling))
    raise UnsupportedError(
        [f"layer {layer_name}: {type(attention).__name__} rotates pairs in an unknown order"]
    )
