"""Models that vLLM runs in Hugging Face's code: their rotary modules, read and made exact.

Such a module rotates nothing itself: it hands cosines and sines to all layers, in one of a few
layouts.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.plugin.rotary import Rotary
from vllm_lminf.rope import RotarySpec, RotationTables

Layout = Callable[[torch.Tensor], torch.Tensor]
"""From the angle of every pair, [..., rotary_dim / 2], to what a module hands out."""


_LAYOUTS: tuple[Layout, ...] = (
    lambda angles: torch.cat((angles, angles), dim=-1),
    lambda angles: angles.repeat_interleave(2, dim=-1),
    lambda angles: angles,
)


class ExactPositionEmbeddings(nn.Module):
    """Takes the place of Hugging Face's rotary module: same angles, exact at any position.

    Args:
        specs: what is rotated in each type of layers; under None where all are alike.
        layout: how the module hands angles out.
        keeps_float32: whether it does so in float32, whatever the model's dtype.
        device: where the model is.
    """

    def __init__(
        self,
        specs: dict[str | None, RotarySpec],
        layout: Layout,
        keeps_float32: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.keeps_float32 = keeps_float32
        rotations = []
        for layer_type, spec in specs.items():
            tables = RotationTables(spec.inv_freq, device)
            setattr(self, f"{layer_type}_tables", tables)
            setattr(self, f"{layer_type}_magnitude", spec.magnitude)
            # Which dimensions make a pair, and which way it is rotated, is up to the layers.
            backwards = replace(spec, inv_freq=-spec.inv_freq)
            for way, its_tables in (
                (spec, tables),
                (backwards, RotationTables(backwards.inv_freq, device)),
            ):
                rotations += [
                    Rotary(replace(way, is_neox_style=style), its_tables) for style in (True, False)
                ]
        self.rotations = tuple(rotations)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines at ``position_ids``, integers [1, num_tokens].

        Returns:
            Two tensors of shape [1, num_tokens, rotary_dim], or half of it.
        """
        angles = getattr(self, f"{layer_type}_tables")(position_ids.flatten())
        magnitude = getattr(self, f"{layer_type}_magnitude")
        dtype = torch.float32 if self.keeps_float32 else x.dtype
        cos, sin = (self.layout(a * magnitude)[None].to(dtype) for a in angles)
        return cos, sin


def is_rotary(module: nn.Module) -> bool:
    """Whether it looks like one of Hugging Face's rotary modules: it has frequencies."""
    return any(_layer_types(module))


def make_exact(
    module: Any, name: str, device: torch.device, distance_limit: int
) -> ExactPositionEmbeddings:
    """What takes the place of one of Hugging Face's rotary modules.

    Some have other frequencies for long sequences (LongRoPE, dynamic NTK): those for a sequence as
    long as the largest distance are taken.

    Args:
        module: the model's.
        name: its name in the model, for messages.
        device: where the model is.
        distance_limit: the engine's.

    Raises:
        UnsupportedError: what it hands out isn't what its frequencies say, in no known layout.
    """
    positions = torch.tensor([[0, 1, 2, 3, 5, 8, 13, distance_limit - 1]], device=device)
    specs: dict[str | None, RotarySpec] = {}
    layouts = list(_LAYOUTS)
    keeps_float32 = True
    for prefix, layer_type in _layer_types(module):
        arguments = () if layer_type is None else (layer_type,)
        x = torch.zeros(1, dtype=torch.bfloat16, device=device)
        try:
            given = module(x.float(), positions, *arguments)
            keeps_float32 = module(x, positions, *arguments)[0].dtype == torch.float32
            inv_freq = getattr(module, f"{prefix}inv_freq").to("cpu", torch.float64)
            magnitude = float(getattr(module, f"{prefix}attention_scaling", 1.0))
        except Exception as error:
            raise UnsupportedError(
                [f"{name}: the rotation of {type(module).__name__}: it can't be read ({error!r})"]
            ) from error
        specs[layer_type] = RotarySpec(inv_freq, is_neox_style=True, magnitude=magnitude)
        angles = positions[0, :-1, None].to("cpu", torch.float64) * inv_freq
        wanted = torch.stack((angles.cos(), angles.sin())) * magnitude
        layouts = [layout for layout in layouts if _is_what(layout(wanted), given)]
    if not layouts:
        raise UnsupportedError(
            [
                f"{name}: the rotation of {type(module).__name__}: its cosines and sines aren't "
                "what its frequencies say"
            ]
        )
    return ExactPositionEmbeddings(specs, layouts[0], keeps_float32, device)


def _layer_types(module: nn.Module) -> Iterator[tuple[str, str | None]]:
    """What the names of a module's frequencies begin with, and the type of layers they are for."""
    for name, _ in module.named_buffers(recurse=False):
        prefix = name.removesuffix("inv_freq")
        if prefix != name and not prefix.endswith(("original_", "long_")):
            yield prefix, prefix.removesuffix("_") or None


def _is_what(wanted: torch.Tensor, given: Any) -> bool:
    """Whether cosines and sines are those; the last position is there for its length alone."""
    if not isinstance(given, tuple) or len(given) != 2 or given[0].is_complex():
        return False
    near = torch.stack(given)[:, 0, :-1].to("cpu", torch.float64)
    return near.shape == wanted.shape and torch.allclose(near, wanted, rtol=0, atol=1e-5)
