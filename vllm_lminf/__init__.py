"""LM-Infinite's Λ-shaped attention for stock vLLM (Han et al., arXiv 2308.16137)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_lminf.nn import LMInfinite

__all__ = ["LMInfinite"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Imports `LMInfinite` when it is asked for: vLLM loads this package in each of its processes,
    with the plugin disabled too, and that must cost nothing."""
    if name == "LMInfinite":
        from vllm_lminf.nn import LMInfinite

        return LMInfinite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
