"""Every kernel compiled ahead of time for GPUs that aren't here, and what it takes of them."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernels.triton import resources
from tests.kernels.triton.resources import LAYERS, PLAIN, SHARED_MEMORY, TARGETS, Usage, table

ROOT = Path(__file__).parents[3]
MOST_SPILLED = 128
"""Bytes a thread, for the layers that matter less: 32 registers."""


def compile_for(target: str, cache: Path) -> list[Usage]:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", resources.__name__, target, "--json"],
        env=environ | {"TRITON_CACHE_DIR": str(cache / target)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [Usage(**usage) for usage in json.loads(result.stdout)]


@pytest.fixture(scope="module")
def usages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Usage]]:
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        targets = ["sm_90", "gfx942", "sm_100", "sm_80"]
        return dict(zip(targets, pool.map(lambda t: compile_for(t, cache), targets), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_it_fits(target: str, usages: dict[str, list[Usage]]) -> None:
    kernels = {(usage.layer, usage.kernel) for usage in usages[target]}
    names = {"write", "decode", "reduce", "prefill"}
    assert kernels == {
        *((layer.name, name) for layer in LAYERS[target] for name in names),
        (PLAIN.name, "join"),
    }
    for usage in usages[target]:
        assert usage.shared <= 1024 * SHARED_MEMORY[target], table([usage])
        assert usage.spilled <= MOST_SPILLED, table([usage])


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_where_it_matters_most(target: str, usages: dict[str, list[Usage]]) -> None:
    for usage in usages[target]:
        if usage.layer == PLAIN.name:
            assert usage.spilled == 0, table([usage])


def test_hopper_is_used_as_such(usages: dict[str, list[Usage]]) -> None:
    """Prefill multiplies by warp groups; keys and values come in copies of 16 bytes, while the
    tile before is computed on."""
    for usage in usages["sm_90"]:
        if usage.kernel in ("decode", "prefill"):
            assert usage.copies > 0, usage
            assert usage.overlaps, usage
            assert usage.wgmma == (usage.kernel == "prefill"), usage


def test_ampere_copies_ahead(usages: dict[str, list[Usage]]) -> None:
    for usage in usages["sm_80"]:
        if usage.kernel in ("decode", "prefill"):
            assert usage.copies > 0, usage
            assert usage.overlaps, usage
