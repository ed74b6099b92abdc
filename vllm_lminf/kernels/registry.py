"""Which kernel a layer runs: the one that was asked for, or the best that can run where it is.

A kernel's module is imported when it is asked about, and the library behind it once it is used.
"""

from dataclasses import dataclass
from importlib import import_module

import torch

from vllm_lminf.kernels.base import Situation
from vllm_lminf.kernels.cpu.kernel import serves

_MODULES = {
    "flash": "vllm_lminf.kernels.flash",
    "hybrid": "vllm_lminf.kernels.hybrid",
    "triton": "vllm_lminf.kernels.triton.layer",
    "xformers": "vllm_lminf.kernels.xformers",
}


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


def choose(asked: str, situation: Situation) -> Choice:
    """The kernel for a layer.

    Args:
        asked: the setting "kernel": a kernel's name, which no other takes the place of, or "auto".
        situation: where the layer is to run.
    """
    against: dict[str, list[str]] = {}
    for kernel in _automatic(situation) if asked == "auto" else (asked,):
        reasons = reasons_against(kernel, situation)
        if not reasons:
            return Choice(kernel, against)
        against[kernel] = reasons
    return Choice(None, against)


def _automatic(situation: Situation) -> tuple[str, ...]:
    """What "auto" looks at, best first.

    A kernel is here where it was measured to be the fastest of those that serve. On GPUs nothing
    has been measured yet, so it is the one that serves most: xformers and, for the prefill of
    devices from compute capability 9.0 on, FlashAttention, alone or beside Triton's kernels, have
    to be asked for by name.

    The plain kernel stands in for what the best one doesn't serve, except that on GPUs nobody gets
    it for a block size: another one costs nothing.
    """
    if situation.device_type == "cpu":
        return "cpu", "reference"
    return ("triton", "reference") if situation.block_size % 16 == 0 else ("triton",)


def reasons_against(kernel: str, situation: Situation) -> list[str]:
    """Why a kernel can't run there; empty when it can."""
    if kernel in _MODULES:
        reasons: list[str] = import_module(_MODULES[kernel]).reasons_against(situation)
        return reasons
    return _cpu_reasons(situation) if kernel == "cpu" else _reference_reasons(situation)


def _cpu_reasons(situation: Situation) -> list[str]:
    reasons = []
    heads = situation.heads
    if situation.device_type != "cpu":
        reasons.append(f"it runs on CPUs, not on {situation.device_type}")
    if not serves(heads.dtype, heads.head_size):
        reasons.append(
            "it takes heads of a multiple of 16 dimensions in float32, float16 or bfloat16, not "
            f"{heads.head_size} in {_name(heads.dtype)}"
        )
    if situation.block_size % 16 != 0:
        reasons.append(
            "it takes blocks of a multiple of 16 tokens, not --block-size "
            f"{situation.block_size}; set --block-size 128"
        )
    if situation.cache_dtype != heads.dtype:
        reasons.append(
            f"it keeps the cache in the model's dtype, not in {_name(situation.cache_dtype)}"
        )
    return reasons


def _reference_reasons(situation: Situation) -> list[str]:
    if situation.cache_dtype.itemsize > 1:
        return []
    return [f"it keeps the cache in 16 or 32 bits, not in {_name(situation.cache_dtype)}"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
