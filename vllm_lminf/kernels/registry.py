"""The kernels: their names, where each is, and which of them a layer runs.

To add one, write its class in a module of its own and add a line here. The module is imported once
the kernel is asked about, and the library behind it once the kernel is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_lminf.kernels.base import Kernel, LayerConfig

_CLASSES = {
    "triton": "vllm_lminf.kernels.triton.layer:TritonKernel",
    "hybrid": "vllm_lminf.kernels.hybrid:HybridKernel",
    "xformers": "vllm_lminf.kernels.xformers:XformersKernel",
    "flash": "vllm_lminf.kernels.flash:FlashKernel",
    "cpu": "vllm_lminf.kernels.cpu.kernel:CpuKernel",
    "reference": "vllm_lminf.kernels.reference:ReferenceKernel",
}
NAMES = tuple(_CLASSES)

AUTOMATIC = "auto"
"""The best kernel that can run."""

PLAIN = "reference"
"""Stands in for what the best kernel doesn't take. It is much slower."""

# Best first. A kernel is here where it was measured to be the fastest of those that serve: on CUDA
# devices of compute capability 9.0 prefill takes 0.78 of the time by two kernels, and decoding as
# long (docs/benchmarks.md). On others it is the one that serves most.
_ORDER = {"cpu": ("cpu", PLAIN), "cuda": ("triton", PLAIN)}
_HOPPER, _HOPPER_ORDER = (9, 0), ("hybrid", "triton", PLAIN)


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what was passed over.

    Attributes:
        kernel: its name; None if nothing that was asked for can run.
        against: for every kernel that was looked at and can't run, in order, the reasons.
    """

    kernel: str | None
    against: dict[str, list[str]]

    @property
    def reasons(self) -> list[str]:
        """All reasons, each with its kernel's name."""
        return [
            f"kernel {name!r}: {reason}"
            for name, reasons in self.against.items()
            for reason in reasons
        ]


def kernel_class(name: str) -> type[Kernel]:
    """The class of a kernel."""
    module, _, attribute = _CLASSES[name].partition(":")
    found: type[Kernel] = getattr(import_module(module), attribute)
    return found


def choose(asked: str, layer: LayerConfig, load: bool = False) -> Choice:
    """The kernel for a layer.

    Args:
        asked: a kernel's name, which no other takes the place of, or "auto".
        layer: the layer.
        load: whether a kernel must also be had in this process, which compiles and loads it.
    """
    against: dict[str, list[str]] = {}
    recalls = layer.middle is not None
    for name in _candidates(asked, layer.device.type, layer.block_size, layer.capability, recalls):
        kernel = kernel_class(name)
        reasons = kernel.unsupported_reasons(layer)
        if recalls and not kernel.recalls:
            reasons = [*reasons, "it recalls nothing from the middle: set middle_top_k to 0"]
        if load and (not reasons or name == asked):
            reasons = reasons + kernel.unavailable_reasons(layer)
        if not reasons:
            return Choice(name, against)
        against[name] = reasons
    return Choice(None, against)


def block_multiple(asked: str, device_type: str) -> int:
    """What the block sizes are multiples of that some kernel takes which may be chosen."""
    names = _candidates(asked, device_type, block_size=1)
    return min(kernel_class(name).block_multiple for name in names)


def preferred_block_size(asked: str, device_type: str) -> int | None:
    """The block size that is best for the first choice; None where it makes no difference."""
    return kernel_class(_candidates(asked, device_type)[0]).preferred_block_size


def _candidates(
    asked: str,
    device_type: str,
    block_size: int = 16,
    capability: tuple[int, int] | None = None,
    recalls: bool = False,
) -> tuple[str, ...]:
    """The kernels to look at, best first. On GPUs nobody gets the plain kernel for a block size:
    another one costs nothing. Nor for a middle: it would read all of the host's archive over the
    bus for every query."""
    if asked != AUTOMATIC:
        return (asked,)
    if device_type == "cpu":
        return _ORDER["cpu"]
    names = _HOPPER_ORDER if capability == _HOPPER else _ORDER["cuda"]
    if recalls or block_size % kernel_class(names[0]).block_multiple:
        return names[:-1]
    return names
