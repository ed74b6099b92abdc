"""vLLM's rotary modules: read, checked against their own tables, and made exact anywhere."""

import importlib.util
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.rotary_embedding import (
    DynamicNTKAlphaRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels.cpu.kernel import CpuRotation
from vllm_lminf.rope import RotarySpec, RotationTables, rotate

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Rotary:
    """A rotation, and its angles at any position. Compared by identity: the layers that one rotary
    module rotates share one object, and what kernels keep for it.

    Attributes:
        spec: which dimensions are rotated, and their frequencies.
        tables: cosines and sines.
    """

    spec: RotarySpec
    tables: RotationTables


class ExactRotaryEmbedding(nn.Module):
    """Takes the place of a model's rotary module: same rotation, exact at any position.

    It is called as vLLM's is, and holds no table that grows with max_model_len.

    Args:
        spec: the rotation.
        head_size: dimensions of a head.
        device: where the model is.
        compiled: whether the compiled kernel for CPUs does it, where no compiler of torch's is at
            work. Otherwise it is Triton's where there is a GPU, and vLLM's own operator elsewhere.
    """

    def __init__(
        self, spec: RotarySpec, head_size: int, device: torch.device, compiled: bool = False
    ) -> None:
        super().__init__()
        self.spec = spec
        self.head_size = head_size
        self.compiled = compiled
        self.tables = RotationTables(spec.inv_freq, device)
        self.rotations = (Rotary(spec, self.tables),)
        self.fused = not compiled and _has_fused_rotation(device)
        self._step_key = f"lminf rotary {id(self)}"

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotates queries and keys.

        Args:
            positions: integers [num_tokens].
            query: shape [num_tokens, num_heads * head_size] or [num_tokens, num_heads, head_size].
            key: the same for the key heads, or None.

        Returns:
            The rotated queries and keys: new tensors or, as with vLLM's own rotary modules, the
            given ones, written in place.
        """
        if positions.dim() != 1:
            positions = positions.flatten()
        if self.fused and _computes(query):
            return self._rotate_fused(positions, query, key)
        if torch.compiler.is_compiling():
            cos_sin = self._compute_cos_sin(positions)
            rotated = self._rotate_traced(query, cos_sin)
            return rotated, None if key is None else self._rotate_traced(key, cos_sin)
        if not self.compiled:
            cos_sin = self._of_step(positions, self._compute_cos_sin)
            rotated = self._rotate_by_operator(query, cos_sin)
            return rotated, None if key is None else self._rotate_by_operator(key, cos_sin)
        rotation = self._of_step(positions, self._compute_rotation)
        query = self._with_heads_together(query)
        key = None if key is None else self._with_heads_together(key)
        rotation.rotate(query, key)
        return query, key

    def _with_heads_together(self, x: torch.Tensor) -> torch.Tensor:
        """A copy, where the dimensions to rotate are parts of longer heads, as DeepSeek's."""
        if x.dim() == 3 and x.stride(1) != self.head_size:
            return x.contiguous()
        return x

    @property
    def cos_sin_cache(self) -> torch.Tensor:
        """The table that vLLM's rotary modules have, for models that hand it to a kernel of their
        own; there is none of a bounded size.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            [
                "the model reads its rotary module's table in a kernel of its own, past the module "
                "that is exact at any position"
            ]
        )

    def _of_step(self, positions: torch.Tensor, compute: Callable[[torch.Tensor], T]) -> T:
        """What follows from the positions alone: all layers of a step ask for the same.

        The first one leaves it in vLLM's forward context, which lives as long as the step. (A
        compiler sees by itself what is the same.)
        """
        if not is_forward_context_available():
            return compute(positions)
        step = get_forward_context().additional_kwargs
        known = step.get(self._step_key)
        if known is None or known[0] is not positions:
            known = step[self._step_key] = (positions, compute(positions))
        result: T = known[1]
        return result

    def _compute_rotation(self, positions: torch.Tensor) -> CpuRotation:
        cos_sin = self._compute_cos_sin(positions)
        return CpuRotation(cos_sin, self.head_size, self.spec.is_neox_style)

    def _compute_cos_sin(self, positions: torch.Tensor) -> torch.Tensor:
        cos_sin = torch.cat(self.tables(positions), dim=-1)
        return cos_sin if self.spec.magnitude == 1.0 else cos_sin * self.spec.magnitude

    def _rotate_fused(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One launch for both, from the tables. Nothing is kept for the other layers of the step:
        where vLLM cuts a compiled model at its attention layers, they share nothing."""
        from vllm_lminf.kernels.triton.rotary import rotary_embedding

        operator = (
            torch.ops.lminf.rotary_embedding if torch.compiler.is_compiling() else rotary_embedding
        )
        rotated_query, rotated_key = operator(
            positions, query, key, self.tables.tables,
            self.head_size, self.spec.is_neox_style, self.spec.magnitude,
        )  # fmt: skip
        return rotated_query, None if key is None else rotated_key

    def _rotate_by_operator(self, x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        """vLLM's own rotary operator, handed a table that holds just this step's rows.

        In float32, whatever x is: the operator takes the table in x's dtype, and cosines rounded to
        16 bits make no rotation that could be rotated back.
        """
        rows = torch.arange(cos_sin.shape[0], device=x.device)
        rotated = x.to(torch.float32, copy=True)
        ops.rotary_embedding(
            rows,
            rotated.view(len(rows), -1),
            None,
            self.head_size,
            cos_sin,
            self.spec.is_neox_style,
        )
        return rotated.to(x.dtype)

    def _rotate_traced(self, x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        """The same in terms that a compiler fuses with what is around it."""
        cos, sin = cos_sin.chunk(2, dim=-1)
        heads = x.view(cos.shape[0], -1, self.head_size)
        return rotate(heads, cos, sin, self.spec.is_neox_style).view(x.shape)


def _has_fused_rotation(device: torch.device) -> bool:
    """Whether Triton rotates heads there: on GPUs, and where its kernels are interpreted."""
    if importlib.util.find_spec("triton") is None:
        return False
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" or (device.type == "cpu" and interprets)


def _computes(x: torch.Tensor) -> bool:
    """Whether Triton computes in x's dtype there: its interpreter rounds to bfloat16 wrongly."""
    return x.is_cuda or x.dtype != torch.bfloat16


def is_rotary(module: nn.Module) -> bool:
    """Whether it is one of vLLM's rotary modules; LongRoPE's has no base class in common."""
    return isinstance(module, (RotaryEmbeddingBase, Phi3LongRoPEScaledRotaryEmbedding))


def make_exact(
    module: Any, name: str, device: torch.device, distance_limit: int, compiled: bool = False
) -> ExactRotaryEmbedding:
    """What takes the place of one of vLLM's rotary modules.

    Args:
        module: the model's.
        name: the module's name in the model, for messages.
        device: where the model is.
        distance_limit: the engine's; LongRoPE's factors are chosen by it.
        compiled: whether the compiled kernel does it, see `ExactRotaryEmbedding`.

    Returns:
        The exact module; the same one whenever it is asked for again.

    Raises:
        UnsupportedError: it isn't served.
    """
    twins = _exact_twins.setdefault(module, {})
    exact = twins.get((distance_limit, compiled))
    if exact is None:
        spec = read_spec(module, name, distance_limit)
        exact = ExactRotaryEmbedding(spec, module.head_size, device, compiled)
        twins[distance_limit, compiled] = exact
    return exact


# vLLM hands one rotary module to every model in a process that asks for the same rotation, a draft
# model among them, whose distance limit may be another.
_exact_twins: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, bool], ExactRotaryEmbedding]] = (
    weakref.WeakKeyDictionary()
)


def read_spec(module: Any, name: str, distance_limit: int) -> RotarySpec:
    """What one of vLLM's rotary modules computes; checked against the table it made for itself.

    Args:
        module: the model's rotary module.
        name: its name, for messages.
        distance_limit: the engine's; LongRoPE's factors are chosen by it.

    Raises:
        UnsupportedError: its kind isn't served, or the table says otherwise.
    """
    kind = type(module)
    magnitude, rows, is_neox_style = 1.0, slice(0, None), True
    with torch.device("cpu"):
        if kind is LinearScalingRotaryEmbedding and len(module.scaling_factors) == 1:
            inv_freq = module._compute_inv_freq(module.base) / module.scaling_factors[0]
        elif kind is YaRNScalingRotaryEmbedding:
            inv_freq = module._compute_inv_freq(module.scaling_factor)
            magnitude = module.mscale
        elif kind is DynamicNTKAlphaRotaryEmbedding:
            exponent = module.rotary_dim / (module.rotary_dim - 2)
            inv_freq = module._compute_inv_freq(module.base * module.scaling_alpha**exponent)
        elif kind is Phi3LongRoPEScaledRotaryEmbedding:
            inv_freq, magnitude, rows = _read_long_rope(module, distance_limit)
        elif isinstance(module, RotaryEmbedding) and _differs_by_its_table_alone(kind):
            # Dynamic NTK among them: its base grows once a sequence passes the trained length.
            # Distances never do here, so it stays what the model was trained with.
            inv_freq = module._compute_inv_freq(module.base)
        else:
            raise UnsupportedError([f"{name}: the rotation of {module} ({kind.__name__})"])
    if isinstance(module, RotaryEmbeddingBase):
        is_neox_style, table = module.is_neox_style, module.cos_sin_cache
    else:
        table = module.long_short_cos_sin_cache
    spec = RotarySpec(inv_freq.to(torch.float64), is_neox_style, magnitude)
    _check_against_table(spec, table[rows][:256], f"{name}: the rotation of {kind.__name__}")
    return spec


def _differs_by_its_table_alone(kind: type[RotaryEmbedding]) -> bool:
    """Whether a kind differs from the plain one in the frequencies of its table alone."""
    own = kind.__mro__[: kind.__mro__.index(RotaryEmbedding)]
    return not any(name.startswith("forward") for ancestor in own for name in vars(ancestor))


def _read_long_rope(
    module: Phi3LongRoPEScaledRotaryEmbedding, distance_limit: int
) -> tuple[torch.Tensor, float, slice]:
    """LongRoPE has factors for short contexts and for long ones. What decides here is the largest
    distance that is ever scored, not max_model_len as in vLLM.

    Returns:
        inv_freq, the magnitude, and the rows of the module's table that this choice fills.
    """
    original = module.original_max_position_embeddings
    if distance_limit <= original:
        factors, magnitude, rows = module.short_factor, module.short_mscale, slice(0, original)
    else:
        factors, magnitude, rows = module.long_factor, module.long_mscale, slice(original, None)
    return module._compute_inv_freq(factors), magnitude, rows


def choice_of_factors(module: Any, distance_limit: int) -> str | None:
    """Which factors LongRoPE takes, as a sentence for the user; None for any other kind."""
    if type(module) is not Phi3LongRoPEScaledRotaryEmbedding:
        return None
    original = module.original_max_position_embeddings
    return (
        f"LongRoPE: distance_limit {distance_limit} takes the "
        f"{'short' if distance_limit <= original else 'long'} factors (the short ones serve up to "
        f"{original})"
    )


def _check_against_table(spec: RotarySpec, table: torch.Tensor, what: str) -> None:
    rows = table.to("cpu", torch.float64)
    angles = torch.arange(len(rows), dtype=torch.float64)[:, None] * spec.inv_freq
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1) * spec.magnitude
    # A table in the model's dtype is off by its rounding; angles below 256 rad add 2**-17.
    tolerance = spec.magnitude * (torch.finfo(table.dtype).eps + 2**-16)
    if rows.shape != expected.shape or not torch.allclose(rows, expected, 0.0, tolerance):
        raise UnsupportedError([f"{what}: its table isn't what its parameters say"])
