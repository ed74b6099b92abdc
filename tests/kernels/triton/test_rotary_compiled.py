"""The fused rotation, compiled: heads go in and out 16 bytes at a time, through registers alone."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_lminf.kernels.triton.rotary import rotary_embedding
from vllm_lminf.rope import RotationTables

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


def compile_for(capability: int, heads: tuple[int, int, int], is_neox_style: bool) -> Any:
    """The kernel for queries, keys and values beside each other, as a projection leaves them."""
    target = GPUTarget("cuda", capability, 32)
    device = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: str(target),
        get_current_stream=lambda device: 0,
    )
    run, compiled = JITFunction.run, []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))

    num_heads, num_kv_heads, size = heads
    sizes = [num_heads * size, num_kv_heads * size, num_kv_heads * size]
    query, key, _ = torch.empty(2, sum(sizes), dtype=torch.bfloat16).split(sizes, dim=1)
    tables = RotationTables(torch.ones(size // 2)).tables
    with (
        mock.patch.object(driver, "_active", device),
        mock.patch.object(JITFunction, "run", record),
    ):
        positions = torch.zeros(2, dtype=torch.int64)
        rotary_embedding(positions, query, key, tables, size, is_neox_style, 1.0)
    (kernel,) = compiled
    return kernel


@pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("heads", [(32, 8, 128), (16, 2, 256)], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_what_it_takes(
    capability: int, heads: tuple[int, int, int], is_neox_style: bool, tmp_path: Path
) -> None:
    kernel = compile_for(capability, heads, is_neox_style)
    code = kernel.asm["ptx"]
    assert re.search(r"ld\.global\.v4\.b32", code)
    assert re.search(r"st\.global\.v4\.b32", code)
    assert not re.search(r"(ld|st)\.global\.b16", code)
    assert kernel.metadata.shared <= 4096
    path = tmp_path / "kernel.ptx"
    path.write_text(code)
    architecture = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
    told = subprocess.run(
        [PTXAS, "-v", f"-arch={architecture}", path, "-o", tmp_path / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in told
    (registers,) = re.findall(r"Used (\d+) registers", told)
    assert int(registers) <= 64, "four programs of 128 threads and more in every multiprocessor"
