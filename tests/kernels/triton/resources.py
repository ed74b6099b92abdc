"""What the kernels take of a GPU, compiled for it ahead of time, in the sizes that `plan` chooses.

``python -m tests.kernels.triton.resources`` prints a table. No GPU is needed: the layer's own
launches are recorded, specialised as at run time, and compiled without being run.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_lminf.kernels.interface import DeviceBatch, Heads, PagedCache, Rotation, ScoreRules
from vllm_lminf.kernels.triton import layer as layer_module
from vllm_lminf.kernels.triton.layer import TritonLayer, Workspace
from vllm_lminf.kernels.triton.plan import Hardware
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotationTables

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Hardware(False, 80, 108)),
    "sm_90": (GPUTarget("cuda", 90, 32), Hardware(False, 90, 132)),
    "sm_100": (GPUTarget("cuda", 100, 32), Hardware(False, 100, 148)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Hardware(True, 0, 304)),
}
SHARED_MEMORY = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""KiB that a program may have."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CACHES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Layer:
    """A layer to compile for.

    Attributes:
        heads: query heads, key heads, head size.
        dtype: "bf16" or "fp16".
        cache: "e4m3" or "e5m2"; None for dtype.
        is_neox: pairing.
        pattern: n_global, n_local, distance_limit.
        block_size: of the cache.
    """

    heads: tuple[int, int, int] = (32, 8, 128)
    dtype: str = "bf16"
    cache: str | None = None
    is_neox: bool = True
    pattern: tuple[int, int, int] = (10, 4096, 4096)
    block_size: int = 128

    @property
    def name(self) -> str:
        style = "neox" if self.is_neox else "gptj"
        limit = "" if self.pattern[1] == self.pattern[2] else " L>W"
        return (
            f"{'/'.join(map(str, self.heads))} {self.dtype} {self.cache or ''} {style} "
            f"G{self.pattern[0]}{limit} B{self.block_size}"
        ).replace("  ", " ")


PLAIN = Layer()
LAYERS = {
    "sm_80": [PLAIN, Layer((16, 4, 256)), Layer(cache="e5m2", dtype="fp16")],
    "sm_90": [
        PLAIN,
        Layer((32, 8, 64), dtype="fp16", is_neox=False, pattern=(100, 4096, 4096), block_size=16),
        Layer((16, 4, 256)),
        Layer(cache="e4m3"),
        Layer(pattern=(100, 4096, 8192), block_size=16),
    ],
    "sm_100": [PLAIN, Layer((16, 4, 256)), Layer(cache="e4m3", is_neox=False)],
    "gfx942": [PLAIN, Layer((16, 4, 256)), Layer(cache="e4m3", block_size=16)],
}


@dataclass(frozen=True)
class Usage:
    """What one kernel takes.

    Attributes:
        target: a name of TARGETS.
        layer: `Layer.name`.
        kernel: "decode", "prefill", or the name of another kernel.
        registers: of a thread.
        spilled: bytes of registers that a thread keeps in memory.
        shared: bytes of shared memory.
        wgmma: whether it multiplies with Hopper's own instruction.
        copies: asynchronous copies of 16 bytes that stand in its code.
        overlaps: whether a loop computes on a tile while others are being copied.
    """

    target: str
    layer: str
    kernel: str
    registers: int
    spilled: int
    shared: int
    wgmma: bool
    copies: int
    overlaps: bool


class _Device:
    """A driver that knows its target and nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: str(target)
        self.get_current_stream = lambda device: 0


@contextmanager
def _recorded(target: GPUTarget) -> Iterator[list[tuple[str, Any]]]:
    """Launches are compiled for the target, and kept instead of run."""
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = self.fn.__name__.removesuffix("_kernel")
        if name == "attention":
            name = "decode" if options["IS_DECODE"] else "prefill"
        compiled.append((name, run(self, *arguments, grid=grid, warmup=True, **options)))

    driver.set_active(_Device(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


def compile_layer(target_name: str, what: Layer) -> list[Usage]:
    """All kernels that a layer launches for a mixed batch; the join for the plain layer alone."""
    target, hardware = TARGETS[target_name]
    heads = Heads(*what.heads, _DTYPES[what.dtype])
    rotation = Rotation(RotationTables(torch.ones(heads.head_size // 2)), what.is_neox)
    with mock.patch.object(layer_module, "hardware_of", return_value=hardware):
        workspace = Workspace(heads, torch.device("cpu"))
    layer = TritonLayer(heads, LambdaPattern(*what.pattern), ScoreRules(0.1), rotation, workspace)
    shape = (4, heads.num_kv_heads, what.block_size, heads.head_size)
    scale = None if what.cache is None else torch.ones(1)
    key, value = torch.empty(2, *shape).to(_CACHES.get(what.cache or "", heads.dtype))
    cache = PagedCache(key, value, scale, scale)
    query = torch.empty(64, heads.num_heads, heads.head_size, dtype=heads.dtype)
    batch = DeviceBatch(
        torch.zeros(3, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, 64, dtype=torch.int32),
        max_query_len=64,
    )
    with _recorded(target) as compiled:
        rows = query[:, : heads.num_kv_heads]
        layer.write_cache(rows, rows, cache, torch.zeros(64, dtype=torch.int64))
        layer.lambda_attention(query, cache, batch, torch.empty_like(query))
        if what == PLAIN:
            lse = torch.empty(heads.num_heads, 64)
            layer.join_global_branch(query, cache, batch, torch.empty_like(query), lse)
    usages = []
    for name, kernel in compiled:
        registers, spilled = (
            _cuda_registers(kernel) if target.backend == "cuda" else _amd_registers(kernel)
        )
        code = kernel.asm["ptx" if target.backend == "cuda" else "amdgcn"]
        usages.append(
            Usage(
                target_name,
                what.name,
                name,
                registers,
                spilled,
                kernel.metadata.shared,
                wgmma="wgmma.mma_async" in code,
                copies=len(re.findall(r"cp\.async\.cg\.shared\.global.*, 0x10,", code)),
                overlaps=bool(re.search(r"async_wait .*\{num = [1-9]", kernel.asm["ttgir"])),
            )
        )
    return usages


def _cuda_registers(kernel: Any) -> tuple[int, int]:
    """Registers and bytes of stack, which these kernels have for spilled registers alone."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", told)
    return int(found[0]), int(found[1])


def _amd_registers(kernel: Any) -> tuple[int, int]:
    code = kernel.asm["amdgcn"]
    (registers,) = re.findall(r"\.vgpr_count: +(\d+)", code)
    (spills,) = re.findall(r"\.vgpr_spill_count: +(\d+)", code)
    return int(registers), 4 * int(spills)


def table(usages: list[Usage]) -> str:
    """In Markdown."""
    lines = ["| target | layer | kernel | registers | spilled bytes | shared KiB |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: |")
    lines += [
        f"| {u.target} | {u.layer} | {u.kernel} | {u.registers} | {u.spilled} "
        f"| {u.shared / 1024:.1f} |"
        for u in usages
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all by default")
    parser.add_argument("--json", action="store_true", help="for programs to read")
    arguments = parser.parse_args()
    usages = [
        usage
        for target in arguments.targets or TARGETS
        for what in LAYERS[target]
        for usage in compile_layer(target, what)
    ]
    print(json.dumps([asdict(usage) for usage in usages]) if arguments.json else table(usages))


if __name__ == "__main__":
    sys.exit(main())
