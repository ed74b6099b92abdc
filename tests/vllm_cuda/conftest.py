"""Tests of vLLM for GPUs are collected only where its Python files are what is imported."""

from importlib.util import find_spec
from pathlib import Path

_SOURCES = Path(__file__).parents[2] / "build" / "vllm-cuda"
_found = find_spec("vllm")

_is_imported = bool(_found) and _SOURCES in Path(_found.origin or "").parents

collect_ignore = [] if _is_imported else ["within", "engine"]
