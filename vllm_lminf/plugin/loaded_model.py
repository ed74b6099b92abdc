"""From a layer to the model around it, and from a loaded model to layers that may run.

vLLM tells an attention layer neither which model it is part of nor when that model is whole.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.config import VllmConfig

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels.base import Kernel
from vllm_lminf.kernels.cpu.kernel import CpuKernel
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import hugging_face, log, probe, rotary
from vllm_lminf.plugin.rotary import Rotary

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Layer(probe.Layer, Protocol):
    """An attention layer that waits for its model.

    Attributes:
        model_pattern: the model's Λ, which the layer's own may differ from.
        kernel_class: of the kernel that it will run.
    """

    model_pattern: LambdaPattern
    kernel_class: type[Kernel]

    def make_ready(self, rotary: Rotary | None) -> None:
        """Is called with the rotation of the layer's queries and keys."""


class LoadedModels:
    """Learns which model each attention layer is put into, and makes the layers of a loaded model
    ready to run.

    torch tells when a module is registered in another; the listener is there only while a layer
    is waiting for its model.
    """

    def __init__(self) -> None:
        self._waiting: WeakSet[Layer] = WeakSet()
        self._holders: WeakSet[nn.Module] = WeakSet()
        self._handle: RemovableHandle | None = None
        self._unsettled: WeakKeyDictionary[nn.Module, list[Layer]]
        self._unsettled = WeakKeyDictionary()

    def expect(self, impl: Layer) -> None:
        """Starts to look for the model that this layer will be part of."""
        self._waiting.add(impl)
        if self._handle is None:
            self._handle = register_module_module_registration_hook(self._on_registration)

    def join(self, impl: Layer) -> nn.Module:
        """The model that holds this layer; to be called once its weights are there.

        Raises:
            UnsupportedError: the layer was put into no module.
        """
        model = self._model_around(impl)
        self._unsettled.setdefault(model, []).append(impl)
        self._waiting.discard(impl)
        if not self._waiting:
            self._stop_listening()
        return model

    def settle(self, engine: VllmConfig) -> None:
        """Makes the layers ready that have joined, those of a draft model among them.

        Args:
            engine: that of the model, or of its draft. What another left, which failed to start,
                is dropped.

        Raises:
            UnsupportedError: a model isn't served.
        """
        while self._unsettled:
            model, impls = self._unsettled.popitem()
            if _layers_of(impls[0].engine) is not _layers_of(engine):
                continue
            compiled = all(issubclass(impl.kernel_class, CpuKernel) for impl in impls)
            limit = impls[0].model_pattern.distance_limit
            # Said of each engine: vLLM gives engines of one process the same rotary modules.
            for module in model.modules():
                if sentence := rotary.choice_of_factors(module, limit):
                    log.info(impls[0].engine, sentence)
            unserved = make_rotations_exact(model, impls[0].device, limit, compiled)
            holders: list[Any] = [m for m in model.modules() if getattr(m, "impl", None) in impls]
            layers = {holder.layer_name: holder.impl for holder in holders}
            for name, found in probe.find_rotations(model, layers, unserved).items():
                layers[name].make_ready(found)

    def _on_registration(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if not self._waiting:
            self._stop_listening()
            return
        if child is not None:
            self._holders.discard(child)
            self._holders.add(parent)

    def _stop_listening(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._holders.clear()

    def _model_around(self, impl: Layer) -> nn.Module:
        """The largest module that holds the layer: vLLM puts its layers into a model of Hugging
        Face's when that is whole, so that several may be left that nothing was seen to hold."""

        def holds(module: nn.Module) -> bool:
            return any(getattr(part, "impl", None) is impl for part in module.modules())

        for model in self._unsettled:
            if holds(model):
                return model
        around = [module for module in self._holders if holds(module)]
        if not around:
            raise UnsupportedError(
                ["an attention layer is in no module: there is no model to run it with"]
            )
        return max(around, key=lambda module: sum(1 for _ in module.modules()))


def _layers_of(engine: VllmConfig) -> dict[str, Any]:
    """Where vLLM collects the layers of an engine's models."""
    layers: dict[str, Any] = engine.compilation_config.static_forward_context
    return layers


models = LoadedModels()


def make_rotations_exact(
    model: nn.Module, device: Any, distance_limit: int, compiled: bool
) -> dict[nn.Module, UnsupportedError]:
    """Replaces all rotary modules of a model by exact ones, once.

    Args:
        model: the model.
        device: where it is.
        distance_limit: its own; see `vllm_lminf.plugin.rotary.make_exact`.
        compiled: whether the compiled kernel for CPUs rotates queries and keys.

    Returns:
        Modules that are left as they are, and why. Layers that run them aren't served; there may be
        none, as in the part of a model that looks at images.
    """
    exact: dict[nn.Module, nn.Module] = {}
    unserved: dict[nn.Module, UnsupportedError] = {}
    for parent, attribute, name, module in list(rotary_modules(model)):
        if module not in exact and module not in unserved:
            try:
                if rotary.is_rotary(module):
                    exact[module] = rotary.make_exact(
                        module, name, device, distance_limit, compiled
                    )
                else:
                    exact[module] = hugging_face.make_exact(module, name, device, distance_limit)
            except UnsupportedError as error:
                unserved[module] = error
        if module in exact:
            setattr(parent, attribute, exact[module])
    return unserved


def rotary_modules(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """Every place of one: the module that holds it, under which name, and its name in the model."""
    for path, parent in model.named_modules():
        for attribute, module in parent.named_children():
            if rotary.is_rotary(module) or hugging_face.is_rotary(module):
                yield parent, attribute, f"{path}.{attribute}".lstrip("."), module
