"""LM-Infinite's Λ-shaped attention for stock vLLM (Han et al., arXiv 2308.16137)."""

__version__ = "0.1.0"
