"""Every kernel compiled ahead of time for GPUs that aren't here, and what it takes of them."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tools import triton_resources
from tools.triton_resources import LAYERS, PLAIN, TARGETS, Usage, table

ROOT = Path(__file__).parents[3]


MOST_SPILLED = 48
"""Bytes a thread: 12 registers, where a tile of 128 rows reads 8 bits from small blocks. What is
served by default spills no more than DEFAULT_SPILLED."""
DEFAULT_SPILLED = 16
MOST_NARROW = 4
"""Instructions; rows moved by two bytes would take 32 and more."""


def compile_for(target: str, cache: Path) -> list[Usage]:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", triton_resources.__name__, target, "--json"],
        env=environ | {"TRITON_CACHE_DIR": str(cache / target)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [
        Usage(**{**usage, "warnings": tuple(usage["warnings"])})
        for usage in json.loads(result.stdout)
    ]


@pytest.fixture(scope="module")
def usages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Usage]]:
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        targets = sorted(TARGETS, key=lambda target: -len(LAYERS[target]))
        return dict(zip(targets, pool.map(lambda t: compile_for(t, cache), targets), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_it_fits(target: str, usages: dict[str, list[Usage]]) -> None:
    """Shared memory within the device's limit, registers nearly without a spill, no warning."""
    for usage in usages[target]:
        assert usage.shared <= TARGETS[target].hardware.shared_memory, table([usage])
        most = DEFAULT_SPILLED if usage.layer == PLAIN.name else MOST_SPILLED
        assert usage.spilled <= most, table([usage])
        assert usage.warnings == (), table([usage])


@pytest.mark.parametrize("target", TARGETS)
def test_all_kernels_are_there(target: str, usages: dict[str, list[Usage]]) -> None:
    kernels = {(usage.layer, usage.kernel, usage.rows) for usage in usages[target]}
    for layer in LAYERS[target]:
        told = {(kernel, rows) for name, kernel, rows in kernels if name == layer.name}
        assert {kernel for kernel, _ in told} >= {"decode", "prefill", "reduce"}
        if layer.top_k > 0:
            assert {kernel for kernel, _ in told} >= {
                "keep", "index", "scan", "recall", "scan long", "recall long"
            }  # fmt: skip
        if layer == PLAIN:
            assert {kernel for kernel, _ in told} >= {"write", "merge"}
            assert {rows for kernel, rows in told if kernel == "decode"} == {16, 32, 64}


@pytest.mark.parametrize("target", [name for name in TARGETS if TARGETS[name].architectures])
def test_decode_runs_two_programs_on_a_multiprocessor(
    target: str, usages: dict[str, list[Usage]]
) -> None:
    """As many as splits are counted for."""
    for usage in usages[target]:
        if usage.kernel == "decode" and usage.rows == 16:
            assert usage.programs >= 2, table([usage])


def test_hopper_is_used_as_such(usages: dict[str, list[Usage]]) -> None:
    """Tiles of 64 rows and more multiply by warp groups, a tile's products one behind the other;
    keys and values come in copies of 16 bytes, while the tile before is computed on."""
    for usage in usages["H100"]:
        if usage.kernel in ("decode", "prefill"):
            assert usage.copies > 0, usage
            assert usage.overlaps, usage
            assert usage.products >= 4 if usage.rows >= 64 else usage.products == 0, usage


@pytest.mark.parametrize("target", ["H100", "A100", "A10, L40S", "B200", "5090"])
def test_scans_copy_ahead(target: str, usages: dict[str, list[Usage]]) -> None:
    """Of an index whose pages hold more than 16 keys: 16 bytes a copy, tiles ahead."""
    scans = [u for u in usages[target] if u.kernel.startswith("scan") and "B16 " not in u.layer]
    assert scans
    for usage in scans:
        assert usage.copies > 0, usage
        assert usage.overlaps, usage


@pytest.mark.parametrize("target", [name for name in TARGETS if TARGETS[name].architectures])
def test_rows_are_moved_in_wide_pieces(target: str, usages: dict[str, list[Usage]]) -> None:
    """Queries, outputs, and what is written to the cache; the halves of a pair that are gathered
    where keys are turned are the few that may be narrow. Pairs of neighbours are always narrow."""
    for usage in usages[target]:
        if usage.kernel in ("decode", "prefill", "write") and "gptj" not in usage.layer:
            assert usage.narrow <= MOST_NARROW, table([usage])


@pytest.mark.parametrize("target", ["A100", "A10, L40S", "4090", "5090"])
def test_others_copy_ahead(target: str, usages: dict[str, list[Usage]]) -> None:
    for usage in usages[target]:
        if usage.kernel in ("decode", "prefill"):
            assert usage.copies > 0, usage
            assert usage.overlaps, usage
