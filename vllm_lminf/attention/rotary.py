"""The model's rotary modules: read, checked against their own tables, and made exact anywhere."""

import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.model_executor.layers.rotary_embedding import (
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from vllm_lminf.rope import RotarySpec, RotationTables, rotate
from vllm_lminf.startup import UnsupportedError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class ExactRotaryEmbedding(nn.Module):
    """Takes the place of a model's rotary module: same rotation, exact at any position.

    It is called as vLLM's is, and holds no table that grows with max_model_len.
    """

    def __init__(self, spec: RotarySpec, head_size: int, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.head_size = head_size
        self.tables = RotationTables(spec.inv_freq, device)

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotates queries and keys.

        Args:
            positions: integers [num_tokens].
            query: shape [num_tokens, num_heads * head_size] or [num_tokens, num_heads, head_size].
            key: the same for the key heads, or None.

        Returns:
            New tensors of the same shapes and dtypes.
        """
        cos, sin = self.tables(positions.flatten())
        if self.spec.magnitude != 1.0:
            cos, sin = cos * self.spec.magnitude, sin * self.spec.magnitude
        return self._turn(query, cos, sin), None if key is None else self._turn(key, cos, sin)

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = x.view(cos.shape[0], -1, self.head_size)
        return rotate(heads, cos, sin, self.spec.is_neox_style).view(x.shape)


# vLLM's LongRoPE is a rotary module without their common base class.
_ROTARY_MODULES = (RotaryEmbeddingBase, Phi3LongRoPEScaledRotaryEmbedding, ExactRotaryEmbedding)


class ParentFinder:
    """Learns which module each attention layer is put into, while the model is being built.

    vLLM's attention layer doesn't know the module around it, which is where the rotary module is.
    torch tells when a module is registered in another; the listener is there only while a layer
    is waiting for its parent.
    """

    def __init__(self) -> None:
        self._waiting: list[weakref.ref[object]] = []
        self._places: weakref.WeakKeyDictionary[object, tuple[weakref.ref[nn.Module], str]]
        self._places = weakref.WeakKeyDictionary()
        self._handle: RemovableHandle | None = None

    def expect(self, impl: object) -> None:
        """Starts to look for the module that will hold this implementation's layer."""
        self._waiting.append(weakref.ref(impl))
        if self._handle is None:
            self._handle = register_module_module_registration_hook(self._on_registration)

    def place_of(self, impl: object) -> tuple[nn.Module, str]:
        """The module that holds this implementation's layer, and the layer's name.

        Raises:
            UnsupportedError: the layer was put into no module.
        """
        place = self._places.get(impl)
        parent = None if place is None else place[0]()
        if place is None or parent is None:
            raise UnsupportedError(
                ["an attention layer is in no module: there is no rotary module to match it with"]
            )
        return parent, place[1]

    def _on_registration(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        impl = getattr(child, "impl", None)
        if impl is None or not any(waiting() is impl for waiting in self._waiting):
            return
        self._places[impl] = weakref.ref(parent), getattr(child, "layer_name", name)
        self._waiting = [w for w in self._waiting if w() is not None and w() is not impl]
        if not self._waiting and self._handle is not None:
            self._handle.remove()
            self._handle = None


parents = ParentFinder()


def make_exact(parent: nn.Module, layer_name: str, device: torch.device) -> ExactRotaryEmbedding:
    """Replaces the rotary module beside an attention layer by an exact one, once.

    Args:
        parent: the module that holds the attention layer.
        layer_name: the layer's name, for messages.
        device: where the model is.

    Returns:
        The exact module; the same one for every layer that shared the original.

    Raises:
        UnsupportedError: there is no rotary module, or more than one, or one that isn't served.
    """
    found = {
        name: module
        for name, module in parent.named_children()
        if isinstance(module, _ROTARY_MODULES)
    }
    if len(found) != 1:
        what = f"has {', '.join(found)}" if found else "has no rotary module of vLLM's"
        raise UnsupportedError(
            [
                f"layer {layer_name}: the module around it ({type(parent).__name__}) {what}; "
                "LM-Infinite needs exactly one, to score at a distance of its choice"
            ]
        )
    ((name, module),) = found.items()
    if isinstance(module, ExactRotaryEmbedding):
        return module
    exact = _exact_twins.get(module)
    if exact is None:
        spec = read_spec(module, layer_name)
        exact = ExactRotaryEmbedding(spec, module.head_size, device)
        _exact_twins[module] = exact
    setattr(parent, name, exact)
    return exact


_exact_twins: weakref.WeakKeyDictionary[nn.Module, ExactRotaryEmbedding]
_exact_twins = weakref.WeakKeyDictionary()


def read_spec(module: RotaryEmbeddingBase, layer_name: str) -> RotarySpec:
    """What one of vLLM's rotary modules computes; checked against the table it made for itself.

    Raises:
        UnsupportedError: its kind isn't served, or the table says otherwise.
    """
    kind = type(module)
    magnitude = 1.0
    with torch.device("cpu"):
        if kind in (RotaryEmbedding, Llama3RotaryEmbedding):
            inv_freq = module._compute_inv_freq(module.base)
        elif kind is LinearScalingRotaryEmbedding and len(module.scaling_factors) == 1:
            inv_freq = module._compute_inv_freq(module.base) / module.scaling_factors[0]
        elif kind is YaRNScalingRotaryEmbedding:
            inv_freq = module._compute_inv_freq(module.scaling_factor)
            magnitude = module.mscale
        else:
            raise UnsupportedError(
                [f"layer {layer_name}: rotary embedding {kind.__name__} is not served"]
            )
    spec = RotarySpec(inv_freq.to(torch.float64), module.is_neox_style, magnitude)
    _check_against_table(spec, module, layer_name)
    return spec


def _check_against_table(spec: RotarySpec, module: RotaryEmbeddingBase, layer_name: str) -> None:
    table = module.cos_sin_cache[:256].to("cpu", torch.float64)
    angles = torch.arange(len(table), dtype=torch.float64)[:, None] * spec.inv_freq
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1) * spec.magnitude
    # A table in the model's dtype is off by its rounding; angles below 256 rad add 2**-17.
    tolerance = spec.magnitude * (torch.finfo(module.cos_sin_cache.dtype).eps + 2**-16)
    if table.shape != expected.shape or not torch.allclose(table, expected, 0.0, tolerance):
        raise UnsupportedError(
            [
                f"layer {layer_name}: the table of its rotary module ({type(module).__name__}) "
                "is not what its parameters say"
            ]
        )
