"""What the kernels take of a GPU, compiled for it ahead of time, in the sizes that `plan` chooses.

``python -m tools.triton_resources`` prints a table. No GPU is needed: the layer's own
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
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_lminf.kernels.archive import RecallBatch
from vllm_lminf.kernels.base import (
    DeviceBatch,
    Heads,
    LayerConfig,
    PagedCache,
    Rotation,
    ScoreRules,
)
from vllm_lminf.kernels.triton import layer as layer_module
from vllm_lminf.kernels.triton.layer import TritonKernel
from vllm_lminf.kernels.triton.plan import Hardware
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotationTables

KIB = 1024


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        target: Triton's.
        hardware: one of them.
        architectures: what ptxas assembles for; Triton's own assembler has one for AMD.
    """

    target: GPUTarget
    hardware: Hardware
    architectures: tuple[str, ...] = ()


TARGETS = {
    "A100": Target(GPUTarget("cuda", 80, 32), Hardware(False, 80, 108, 163 * KIB), ("sm_80",)),
    # Triton compiles the same for 8.9, but for conversions from float8_e4m3fn.
    "A10, L40S": Target(
        GPUTarget("cuda", 86, 32), Hardware(False, 86, 72, 99 * KIB), ("sm_86", "sm_89")
    ),
    "4090": Target(GPUTarget("cuda", 89, 32), Hardware(False, 89, 128, 99 * KIB), ("sm_89",)),
    "H100": Target(GPUTarget("cuda", 90, 32), Hardware(False, 90, 132, 227 * KIB), ("sm_90a",)),
    "B200": Target(GPUTarget("cuda", 100, 32), Hardware(False, 100, 148, 227 * KIB), ("sm_100a",)),
    "5090": Target(GPUTarget("cuda", 120, 32), Hardware(False, 120, 170, 99 * KIB), ("sm_120a",)),
    "MI300X": Target(GPUTarget("hip", "gfx942", 64), Hardware(True, 0, 304, 64 * KIB)),
}

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
        top_k: keys that are recalled from the middle; 0 for a layer without one.
    """

    heads: tuple[int, int, int] = (32, 8, 128)
    dtype: str = "bf16"
    cache: str | None = None
    is_neox: bool = True
    pattern: tuple[int, int, int] = (10, 4096, 4096)
    block_size: int = 128
    top_k: int = 0

    @property
    def name(self) -> str:
        style = "neox" if self.is_neox else "gptj"
        limit = "" if self.pattern[1] == self.pattern[2] else " L>W"
        return (
            f"{'/'.join(map(str, self.heads))} {self.dtype} {self.cache or ''} {style} "
            f"G{self.pattern[0]}{limit} B{self.block_size}{f' top {self.top_k}' * (self.top_k > 0)}"
        ).replace("  ", " ")


PLAIN = Layer()
_WIDE, _SMALL_BLOCKS = Layer((16, 4, 256)), Layer(block_size=16)
RECALLING = Layer(top_k=5)
_TWO_LIMITS = Layer(
    (32, 8, 64), dtype="fp16", is_neox=False, pattern=(100, 4096, 8192), block_size=16
)
LAYERS = {
    "A100": [PLAIN, RECALLING, _WIDE, _SMALL_BLOCKS, Layer(cache="e5m2", dtype="fp16")],
    "A10, L40S": [
        PLAIN,
        RECALLING,
        Layer((9, 3, 64), is_neox=False, block_size=16, top_k=40),
        _WIDE,
        _SMALL_BLOCKS,
        _TWO_LIMITS,
    ],
    "4090": [Layer(cache="e4m3", block_size=16), Layer((16, 4, 256), cache="e4m3")],
    "H100": [
        PLAIN,
        _WIDE,
        _SMALL_BLOCKS,
        _TWO_LIMITS,
        Layer(cache="e4m3"),
        Layer((16, 4, 256), cache="e5m2"),
        Layer(pattern=(100, 4096, 8192), block_size=16),
        RECALLING,
        Layer((16, 4, 256), dtype="fp16", top_k=64),
    ],
    "B200": [PLAIN, RECALLING, _WIDE, Layer(cache="e4m3", is_neox=False, block_size=16)],
    "5090": [PLAIN, RECALLING, _WIDE, Layer((32, 8, 64)), Layer(cache="e4m3", block_size=16)],
    "MI300X": [PLAIN, RECALLING, _WIDE, Layer(cache="e4m3", block_size=16)],
}
"""Of PLAIN every kernel that serves it is compiled, of the others one of each kind."""


@dataclass(frozen=True)
class Usage:
    """What one kernel takes.

    Attributes:
        architecture: what it was assembled for.
        target: a name of TARGETS.
        layer: `Layer.name`.
        kernel: "decode", "prefill", or the name of another kernel: "scan" for decode steps,
            "scan long" for others, likewise "recall".
        rows: of a tile; 0 where there is none.
        threads: of a program.
        registers: of a thread.
        spilled: bytes of registers that a thread keeps in memory.
        shared: bytes of shared memory.
        warnings: ptxas's: C7515 where products of Hopper's warp groups wait for one another.
        products: of warp groups in a row with no wait between, the most; 0 where there are none.
        copies: asynchronous copies of 16 bytes that stand in its code.
        overlaps: whether a loop computes on a tile while others are being copied.
        narrow: loads and stores of two bytes of global memory, which rows aren't moved by.
    """

    architecture: str
    target: str
    layer: str
    kernel: str
    rows: int
    threads: int
    registers: int
    spilled: int
    shared: int
    warnings: tuple[str, ...]
    products: int
    copies: int
    overlaps: bool
    narrow: int

    @property
    def programs(self) -> int:
        """How many have room on a multiprocessor of an NVIDIA device at once."""
        limit = TARGETS[self.target].hardware.shared_memory + KIB
        registers = -(-self.registers // 8) * 8 * self.threads
        return min(65536 // registers, limit // (self.shared + KIB))


class _Device:
    """A driver that knows its target and nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: str(target)
        self.get_current_stream = lambda device: 0


@contextmanager
def _recorded(target: GPUTarget) -> Iterator[dict[str, tuple[str, int, Any]]]:
    """Launches are compiled for the target, and kept by their hash instead of run."""
    compiled: dict[str, tuple[str, int, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        name = self.fn.__name__.removesuffix("_kernel")
        if name == "attention":
            name = "decode" if options["IS_DECODE"] else "prefill"
        if name in ("scan", "recall") and not options["IS_DECODE"]:
            name += " long"
        compiled[kernel.hash] = name, options.get("TILE_ROWS", 0), kernel

    with (
        mock.patch.object(driver, "_active", _Device(target)),
        mock.patch.object(JITFunction, "run", compile_only),
        # Assembled here, once for every architecture, with what ptxas has to say.
        mock.patch.object(CUDABackend, "make_cubin", return_value=b""),
    ):
        yield compiled


def compile_layer(target_name: str, what: Layer) -> list[Usage]:
    """The kernels that a layer launches, see `LAYERS`; the merge for the plain layer alone."""
    target = TARGETS[target_name]
    heads = Heads(*what.heads, _DTYPES[what.dtype])
    config = LayerConfig(
        heads=heads,
        pattern=LambdaPattern(*what.pattern),
        rules=ScoreRules(0.1),
        cache_dtype=heads.dtype,
        block_size=what.block_size,
        device=torch.device("cpu"),
        rotation=Rotation(RotationTables(torch.ones(heads.head_size // 2)), what.is_neox),
        middle=Middle(what.top_k, 2048, 64) if what.top_k > 0 else None,
    )
    with mock.patch.object(layer_module, "hardware_of", return_value=target.hardware):
        layer = TritonKernel(config)
    shape = (4, heads.num_kv_heads, what.block_size, heads.head_size)
    scale = None if what.cache is None else torch.ones(1)
    key, value = torch.empty(2, *shape).to(_CACHES.get(what.cache or "", heads.dtype))
    cache = PagedCache(key, value, scale, scale)
    with _recorded(target.target) as compiled:
        if what == PLAIN:
            layer.warm_up(cache, max_requests=256, max_query_len=8192)
            layer.warm_up_merge(cache, max_query_len=8192)
        else:
            numbers = torch.zeros(2, dtype=torch.int32)
            query = torch.empty(64, heads.num_heads, heads.head_size, dtype=heads.dtype)
            output = torch.empty_like(query)
            recall = RecallBatch(numbers[1:, None], numbers[1:].long(), numbers[1:])
            pages = torch.empty(1, config.archive_format.page_bytes, dtype=torch.uint8)
            for queries in (1, 64):
                batch = DeviceBatch(numbers, numbers[1:], numbers[1:, None], queries)
                if what.top_k == 0:
                    layer.attend(query, cache, batch, output)
                    continue
                rows = query[:1, : heads.num_kv_heads]
                layer.write_archive(rows, rows, pages, batch, recall)
                layer.attend_and_recall(query, cache, batch, pages, recall, output)
    return [
        _usage(target_name, what, name, rows, kernel, architecture)
        for name, rows, kernel in compiled.values()
        for architecture in target.architectures or [str(target.target.arch)]
    ]


def _usage(
    target_name: str, what: Layer, name: str, rows: int, kernel: Any, architecture: str
) -> Usage:
    is_cuda = TARGETS[target_name].target.backend == "cuda"
    code = kernel.asm["ptx" if is_cuda else "amdgcn"]
    warnings, products = [], 0
    if is_cuda:
        registers, spilled, warnings, machine_code = assemble(code, architecture)
        products = most_products(machine_code)
    else:
        (registers,) = map(int, re.findall(r"\.vgpr_count: +(\d+)", code))
        (spills,) = map(int, re.findall(r"\.vgpr_spill_count: +(\d+)", code))
        spilled = 4 * spills
    return Usage(
        architecture,
        target_name,
        what.name,
        name,
        rows,
        kernel.metadata.num_warps * TARGETS[target_name].target.warp_size,
        registers,
        spilled,
        kernel.metadata.shared,
        tuple(warnings),
        products,
        copies=len(re.findall(r"cp\.async\.cg\.shared\.global.*, 0x10,", code)),
        overlaps=bool(re.search(r"async_wait .*\{num = [1-9]", kernel.asm["ttgir"])),
        narrow=len(re.findall(r"\b(?:ld|st)\.global\S*\.b16 ", code)),
    )


def assemble(ptx: str, architecture: str) -> tuple[int, int, list[str], str]:
    """Registers, bytes spilled, numbers of warnings, and for Hopper the machine code."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptxas = "ptxas-blackwell" if architecture.startswith(("sm_10", "sm_12")) else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [tools / ptxas, "-v", f"--gpu-name={architecture}", source, "-o", result]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        code = ""
        if architecture == "sm_90a":
            command = [tools / "cuobjdump", "-sass", result]
            code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers,) = re.findall(r"Used (\d+) registers", told)
    (stack,) = re.findall(r"(\d+) bytes stack frame", told)
    return int(registers), int(stack), sorted(set(re.findall(r"C7\d\d\d", told))), code


def most_products(code: str) -> int:
    """How many products of warp groups stand in a row, at the most, before one is waited for."""
    instructions = re.findall(r"\b(?:HGMMA|WARPGROUP\.DEPBAR)", code)
    runs = "".join("p" if found == "HGMMA" else " " for found in instructions).split()
    return max(map(len, runs), default=0)


def table(usages: list[Usage]) -> str:
    """In Markdown."""
    lines = [
        "| device | for | layer | kernel | rows | registers | spilled bytes | shared KiB "
        "| programs | products in a row | warnings |"
    ]
    lines.append("| --- | --- | --- | --- " + 6 * "| ---: " + "| --- |")
    lines += [
        f"| {u.target} | {u.architecture} | {u.layer} | {u.kernel} | {u.rows or ''} "
        f"| {u.registers} | {u.spilled} | {u.shared / KIB:.1f} "
        f"| {u.programs if TARGETS[u.target].architectures else ''} | {u.products or ''} "
        f"| {' '.join(u.warnings)} |"
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
