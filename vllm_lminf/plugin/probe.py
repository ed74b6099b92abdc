"""The rotation of the queries and keys of each layer: found out by running the loaded model.

A model is run on the same few tokens at different positions, in the way that vLLM warms a model up:
its attention layers give zeros, so that what enters each of them depends on its token and nothing
else. Between a run at position 0 and one at position p, queries and keys must then differ by the
rotation by p of one of the model's rotary modules, and values must not differ. Everything that
isn't so (layers that rotate nothing, parts of heads that aren't the leading one, learned positions,
factors that depend on the position) shows in these numbers, whatever the model's code is like.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.forward_context import set_forward_context

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels.base import ScoreRules
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import speculation, trained_length, versions
from vllm_lminf.plugin.config import LambdaConfig
from vllm_lminf.plugin.rotary import Rotary
from vllm_lminf.rope import rotate

NUM_TOKENS = 8

Watch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Is shown the queries, keys and values of a layer; each [num_tokens, heads, head_size]."""


class Layer(Protocol):
    """An attention layer, as far as it matters here.

    Attributes:
        engine: what it is built for.
        device: where its model is.
        pattern: its Λ.
        rules: how its products become scores.
        head_size: dimensions of a head.
        watch: is called, where it is set, by a run that computes no attention.
    """

    engine: VllmConfig
    device: torch.device
    pattern: LambdaPattern
    rules: ScoreRules
    head_size: int
    watch: Watch | None


@dataclass(frozen=True)
class _Seen:
    """What reached a layer's attention in one run; float64, on the CPU.

    Attributes:
        query, key, value: each [NUM_TOKENS, heads, head_size].
        tolerance: of a number, in units of the largest of its head.
        rotations: of the rotary modules that had been called by then.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    tolerance: float
    rotations: tuple[Rotary, ...]


def find_rotations(
    model: nn.Module,
    layers: Mapping[str, Layer],
    unserved: dict[nn.Module, UnsupportedError],
) -> dict[str, Rotary | None]:
    """Finds the rotation of every layer, or refuses.

    Args:
        model: a model of vLLM's with its weights, whose rotary modules are exact.
        layers: its attention layers, by name.
        unserved: rotary modules that aren't exact, and why.

    Returns:
        The rotation of each layer; None for one that rotates nothing and need not.

    Raises:
        UnsupportedError: a layer isn't served; all of them are named.
    """
    engine = next(iter(layers.values())).engine
    longest = engine.model_config.max_model_len
    run = _Runs(model, layers, unserved, engine)
    rest = run(torch.zeros(NUM_TOKENS, dtype=torch.int64))
    found: dict[str, Rotary | None] = {}
    reasons: dict[str, list[str]] = {}
    # The near positions come first: a table of learned positions ends somewhere.
    near = torch.arange(NUM_TOKENS) % longest
    far = torch.tensor([(longest - 1) >> halvings for halvings in range(NUM_TOKENS)])
    for positions in (near, far):
        seen = run(positions)
        for name, impl in layers.items():
            try:
                found[name] = _find_rotation(impl, rest[name], seen[name], positions)
            except UnsupportedError as error:
                for reason in error.reasons:
                    reasons.setdefault(reason, []).append(name)
        if reasons:
            raise UnsupportedError([f"{_listed(n)}: {r}" for r, n in reasons.items()])
    return found


def _listed(names: list[str]) -> str:
    word = "layer" if len(names) == 1 else "layers"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{word} {', '.join(names[:3])}{more}"


def _find_rotation(impl: Layer, rest: _Seen, seen: _Seen, positions: torch.Tensor) -> Rotary | None:
    """The rotation that makes of what was seen at position 0 what was seen at these positions."""
    tolerance = seen.tolerance
    for what in ("query", "key", "value"):
        before, after = getattr(rest, what), getattr(seen, what)
        if len(before) != NUM_TOKENS:
            raise UnsupportedError(
                [f"it has a {what} of {len(before)} rows for {NUM_TOKENS} tokens"]
            )
        if not (before.isfinite().all() and after.isfinite().all() and before.any()):
            raise UnsupportedError(
                [f"its rotation doesn't show: a {what} that is zero or not finite, in a trial run"]
            )
    if not _is_same(seen.value, rest.value, tolerance):
        raise UnsupportedError(
            [
                "its values depend on the position: a position is added to what enters the layer, "
                "as where positions are learned; no relative encoding"
            ]
        )
    has_alibi = impl.rules.alibi_slopes is not None
    candidates: list[Rotary | None] = [] if has_alibi else list(seen.rotations)
    # Without global tokens all distances are true ones, and nothing is ever rotated.
    if has_alibi or impl.pattern.n_global == 0:
        candidates.append(None)
    for rotary in candidates:
        if scale := _scale_of_queries(rest, seen, positions, rotary):
            _check_scale(impl.engine, *scale)
            return rotary
    if has_alibi:
        raise UnsupportedError(["it has ALiBi, and its queries and keys are rotated as well"])
    if _scale_of_queries(rest, seen, positions, None):
        raise UnsupportedError(
            [
                "its queries and keys don't depend on the position: a layer without a relative "
                "encoding, which LM-Infinite needs, to score at a distance of its choice"
            ]
        )
    raise UnsupportedError(
        [
            f"its queries and keys, {impl.head_size} dimensions each, aren't rotated by a rotation "
            f"of a head's leading dimensions that is known ({_named(seen.rotations)})"
        ]
    )


def _named(rotations: Iterable[Rotary]) -> str:
    dims = sorted({rotary.spec.rotary_dim for rotary in rotations})
    return f"those called rotate {', '.join(map(str, dims))} of them" if dims else "none was called"


def _scale_of_queries(
    rest: _Seen, seen: _Seen, positions: torch.Tensor, rotary: Rotary | None
) -> tuple[float, int] | None:
    """Whether it is this rotation, for the queries times a factor for each token.

    Returns:
        The factor that is furthest from 1, rounded to 1 if that is within the tolerance, and its
        position; None if it isn't this rotation.
    """
    query, key = (_rotate(x, positions, rotary) for x in (rest.query, rest.key))
    if query is None or key is None or not _is_same(seen.key, key, seen.tolerance):
        return None
    scale = (seen.query * query).sum((1, 2)) / query.square().sum((1, 2))
    if not _is_same(seen.query, query * scale[:, None, None], seen.tolerance):
        return None
    worst = int((scale - 1).abs().argmax())
    factor = float(scale[worst])
    # A sum over all heads is far more precise than each number.
    return (factor if abs(factor - 1) > seen.tolerance / 8 else 1.0), int(positions[worst])


def _rotate(x: torch.Tensor, positions: torch.Tensor, rotary: Rotary | None) -> torch.Tensor | None:
    if rotary is None:
        return x
    if rotary.spec.rotary_dim > x.shape[-1]:
        return None
    angles = positions[:, None].double() * rotary.spec.inv_freq
    return rotate(x, angles.cos(), angles.sin(), rotary.spec.is_neox_style)


def _is_same(x: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    error, size = (x - wanted).abs().amax(-1), wanted.abs().amax(-1)
    return bool((error <= tolerance * size).all())


def _check_scale(engine: VllmConfig, factor: float, position: int) -> None:
    """A factor on the queries passes through all that LMINF does with them, but it depends on the
    position itself: it is known at those that the model was trained on."""
    if factor == 1.0:
        return
    model = engine.model_config
    length = LambdaConfig.of(engine).trained.length
    if speculation.is_draft(model):
        length = trained_length.of(model).length
    if length is not None and model.max_model_len <= length:
        return
    serves = "" if length is None else f"; --max-model-len {length} serves what it was trained on"
    raise UnsupportedError(
        [
            f"its queries are multiplied by a factor that depends on the position "
            f"({factor:.3g} at {position}){serves}"
        ]
    )


class _Runs:
    """Runs a model on the same tokens at positions of choice."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        unserved: dict[nn.Module, UnsupportedError],
        engine: VllmConfig,
    ) -> None:
        self._model, self._layers, self._unserved = model, layers, unserved
        self._engine = engine
        self._device = next(iter(layers.values())).device
        self._inputs = _inputs(model, engine, self._device)

    @torch.inference_mode()
    def __call__(self, positions: torch.Tensor) -> dict[str, _Seen]:
        """What reached each layer.

        Raises:
            UnsupportedError: a rotary module that isn't exact was called, or the model can't run.
        """
        seen: dict[str, _Seen] = {}
        called: list[Rotary] = []

        def note(module: Any, _: Any) -> None:
            called.extend(rotary for rotary in module.rotations if rotary not in called)

        def refuse(module: nn.Module, _: Any) -> None:
            raise self._unserved[module]

        def watch(name: str) -> Watch:
            def on_inputs(*inputs: torch.Tensor) -> None:
                # Some bits are lost in norms, products and the rotation.
                tolerance = max(16 * torch.finfo(inputs[0].dtype).eps, 1e-4)
                query, key, value = (x.to("cpu", torch.float64) for x in inputs)
                seen[name] = _Seen(query, key, value, tolerance, tuple(called))

            return on_inputs

        with ExitStack() as stack:
            for module in self._model.modules():
                if hasattr(module, "rotations"):
                    stack.callback(module.register_forward_pre_hook(note).remove)
                elif module in self._unserved:
                    stack.callback(module.register_forward_pre_hook(refuse).remove)
            for name, impl in self._layers.items():
                impl.watch = watch(name)
                stack.callback(impl.__setattr__, "watch", None)
            versions.leave_adapters_out(self._model, NUM_TOKENS)
            stack.enter_context(set_current_vllm_config(self._engine))
            stack.enter_context(
                set_forward_context(None, self._engine, num_tokens=NUM_TOKENS, skip_compiled=True)
            )
            try:
                self._model.forward(positions=positions.to(self._device), **self._inputs)
            except UnsupportedError:
                raise
            except Exception as error:
                raise UnsupportedError(
                    [
                        f"a trial run of {type(self._model).__name__} at positions up to "
                        f"{int(positions.max())}, to see how its layers rotate queries and keys, "
                        f"failed: {error!r}"
                    ]
                ) from error
        if missing := self._layers.keys() - seen.keys():
            raise UnsupportedError(
                [f"{_listed(sorted(missing))}: not run by a forward pass of the model around it"]
            )
        return seen


def _inputs(model: Any, engine: VllmConfig, device: torch.device) -> dict[str, Any]:
    """Arguments of a model's forward, but for the positions: what vLLM's runners call models with.

    Raises:
        UnsupportedError: the model takes none, or needs others.
    """
    config = engine.model_config
    generator = torch.Generator().manual_seed(0)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    def hidden_states() -> torch.Tensor:
        size = NUM_TOKENS, config.get_hidden_size()
        return noise(torch.empty(size, dtype=config.dtype, device=device))

    def intermediate_tensors() -> Any:
        if engine.parallel_config.pipeline_parallel_size == 1 or get_pp_group().is_first_rank:
            return None
        tensors = model.make_empty_intermediate_tensors(NUM_TOKENS, config.dtype, device)
        for name, tensor in tensors.items():
            tensors[name] = noise(tensor)
        return tensors

    makers: dict[str, Callable[[], Any]] = {
        "input_ids": lambda: (
            torch.arange(1, NUM_TOKENS + 1, device=device) % config.get_vocab_size()
        ),
        "inputs_embeds": lambda: None,
        "intermediate_tensors": intermediate_tensors,
        "hidden_states": hidden_states,  # a draft model's, that reads those of the model
    }
    parameters = inspect.signature(model.forward).parameters
    needed = {name for name, p in parameters.items() if _is_needed(p)} - {"positions"}
    if "positions" not in parameters or needed - makers.keys():
        raise UnsupportedError(
            [
                f"{type(model).__name__} isn't called with tokens and their positions, but with "
                f"{', '.join(parameters)}"
            ]
        )
    return {name: make() for name, make in makers.items() if name in parameters}


def _is_needed(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    return parameter.default is parameter.empty and not variadic
