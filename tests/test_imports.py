"""Which module of the package knows which other, read from the sources.

All imports count: those in functions too, and those that only a type checker sees.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vllm_lminf

ROOT = Path(vllm_lminf.__file__).parent
KNOWS_VLLM = ("vllm_lminf.plugin", "vllm_lminf.cli")
"""Folders whose modules may import vLLM. The command line asks what is installed."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imported_names(path: Path) -> Iterator[str]:
    """Every module that is imported, and every name that may be one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def module_of(name: str) -> str | None:
    """The module of this package that a name is, or is in."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name if name in MODULES else None


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Of each module, those of this package that it imports."""
    return {
        module: {found for name in imported_names(path) if (found := module_of(name))} - {module}
        for module, path in MODULES.items()
    }


def test_no_cycle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' <- '.join(error.args[1])}")


def test_the_graph_is_that_of_the_package(graph: dict[str, set[str]]) -> None:
    """It sees what it is to judge."""
    assert "vllm_lminf.kernels.base" in graph["vllm_lminf.kernels.reference"]
    assert "vllm_lminf.plugin.metrics" in graph["vllm_lminf.plugin.patches"]  # in a function
    assert "vllm_lminf.kernels.base" in graph["vllm_lminf.kernels.registry"]  # for types


def test_vllm_is_imported_below_one_folder() -> None:
    for module, path in MODULES.items():
        if not module.startswith(KNOWS_VLLM):
            theirs = {name for name in imported_names(path) if name.split(".")[0] == "vllm"}
            assert not theirs, module


def test_kernels_know_nothing_of_the_plugin(graph: dict[str, set[str]]) -> None:
    names = ("kernels", "pattern", "middle", "rope", "errors")
    below = tuple(f"vllm_lminf.{name}" for name in names)
    for module, known in graph.items():
        if module.startswith(below):
            assert not any(name.startswith(KNOWS_VLLM) for name in known), module
