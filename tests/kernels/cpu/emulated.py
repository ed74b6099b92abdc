"""Runs tests of the compiled kernels, built for another CPU and emulated.

A process of its own, the first two arguments with arguments of their own:
``python -m tests.kernels.cpu.emulated COMPILER EMULATOR FOLDER TESTS...``.

torch runs here; every call of the kernels is sent, with the memory
that it refers to, to a process of that other CPU (`emulated.cpp`).
"""

import ctypes
import functools
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lminf.kernels.cpu import build, kernel


class Emulated:
    """Stands in for a loaded library."""

    def __init__(self, dtype: torch.dtype, compiler: str, emulator: str, folder: Path) -> None:
        self._size = dtype.itemsize
        name = str(dtype).removeprefix("torch.")
        program = folder / f"emulated-{name}"
        sources = [Path(__file__).with_suffix(".cpp"), build.SOURCES / "kernels.cpp"]
        flags = [flag for flag in build.FLAGS if flag != "-shared"]
        flags += [f"-DLMINF_STORAGE={build._STORAGE[name]}", f"-I{build.SOURCES}"]
        command = [*shlex.split(compiler), *flags, "-o", program, *sources, *build._LIBRARIES]
        subprocess.run(command, check=True)
        self._process = subprocess.Popen(
            [*shlex.split(emulator), program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def lminf_ask_for_amx(self) -> int:
        return 0

    def lminf_attention(self, batch_reference: Any, layer_reference: Any) -> None:
        batch, layer = batch_reference._obj, layer_reference._obj
        self._call(0, self._attended(batch, layer), bytes(batch) + bytes(layer))

    def lminf_attend_and_recall(
        self,
        batch_reference: Any,
        layer_reference: Any,
        recall_reference: Any,
        archive_reference: Any,
    ) -> None:
        batch, layer = batch_reference._obj, layer_reference._obj
        recall, archive = recall_reference._obj, archive_reference._obj
        regions = self._attended(batch, layer)
        regions += self._recalled(recall, archive, batch.num_requests)
        self._call(3, regions, b"".join(map(bytes, (batch, layer, recall, archive))))

    def lminf_write_archive(
        self,
        layer_reference: Any,
        recall_reference: Any,
        archive_reference: Any,
        key: int,
        key_stride: int,
        value: int,
        value_stride: int,
    ) -> None:
        # Without the tensors of the last attention, if there was one.
        layer = _without_tensors(layer_reference._obj)
        recall, archive = recall_reference._obj, archive_reference._obj
        width = layer.num_kv_heads * layer.head_size
        regions = [
            (key, self._rows(recall.num_tokens, key_stride, width), False),
            (value, self._rows(recall.num_tokens, value_stride, width), False),
            *self._recalled(recall, archive, 0, is_written=True),
            *self._rules(layer),
        ]
        rest = bytes((ctypes.c_int64 * 4)(key, key_stride, value, value_stride))
        self._call(4, regions, b"".join(map(bytes, (layer, recall, archive))) + rest)

    def _attended(self, batch: Any, layer: Any) -> list[tuple[int | None, int, bool]]:
        """What attention refers to."""
        requests, entries = batch.num_requests, batch.num_requests * batch.block_table_stride
        start = (ctypes.c_int32 * (requests + 1)).from_address(batch.query_start_loc)
        table = (ctypes.c_int32 * entries).from_address(batch.block_table)
        width = layer.num_heads * layer.head_size
        angles = 4 * start[requests] * batch.rotary_half
        columns = 4 * batch.rotary_half * batch.key_stride
        return [
            (batch.query_start_loc, 4 * len(start), False),
            (batch.seq_lens, 4 * requests, False),
            (batch.block_table, 4 * entries, False),
            (batch.query_cos, angles, False),
            (batch.query_sin, angles, False),
            (batch.key_cos, columns, False),
            (batch.key_sin, columns, False),
            (layer.query, self._rows(start[requests], layer.query_stride, width), False),
            (layer.output, self._rows(start[requests], layer.output_stride, width), True),
            (layer.kv_cache, self._blocks(layer, max(table, default=0)), False),
            *self._rules(layer),
        ]

    def _recalled(
        self, recall: Any, archive: Any, num_requests: int, is_written: bool = False
    ) -> list[tuple[int | None, int, bool]]:
        """What a step with an archive refers to; of requests, so many."""
        entries = num_requests * recall.block_table_stride
        table = (ctypes.c_int32 * entries).from_address(recall.block_table)
        slots = (ctypes.c_int64 * recall.num_tokens).from_address(recall.slots)
        last = max([*table, *(slot // archive.block_size for slot in slots)], default=-1)
        angles = 4 * recall.num_tokens * recall.rotary_half
        return [
            (recall.block_table, 4 * entries, False),
            (recall.slots, 8 * recall.num_tokens, False),
            (recall.first_rows, 4 * num_requests, False),
            (recall.key_cos, angles, False),
            (recall.key_sin, angles, False),
            (recall.query_cos, angles, False),
            (recall.query_sin, angles, False),
            (archive.pages, (last + 1) * archive.page_bytes, is_written),
        ]

    def lminf_write_cache(
        self,
        layer_reference: Any,
        key: int,
        key_stride: int,
        value: int,
        value_stride: int,
        slots: int,
        num_tokens: int,
    ) -> None:
        layer = layer_reference._obj
        highest = max((ctypes.c_int64 * num_tokens).from_address(slots), default=-1)
        width = layer.num_kv_heads * layer.head_size
        regions = [
            (key, self._rows(num_tokens, key_stride, width), False),
            (value, self._rows(num_tokens, value_stride, width), False),
            (slots, 8 * num_tokens, False),
            (layer.kv_cache, self._blocks(layer, highest // layer.block_size), True),
            *self._rules(layer),
        ]
        # Of the last attention, if there was one.
        layer.query = layer.output = None
        rest = (key, key_stride, value, value_stride, slots, num_tokens)
        self._call(1, regions, bytes(layer) + bytes((ctypes.c_int64 * 6)(*rest)))

    def lminf_rotate(self, query: int, key: int | None, reference: Any) -> None:
        rotation = reference._obj
        tokens = rotation.num_tokens
        regions = [(rotation.cos_sin, 8 * tokens * rotation.rotary_half, False)]
        for x, stride, heads in (
            (query, rotation.query_stride, rotation.num_heads),
            (key, rotation.key_stride, rotation.num_kv_heads),
        ):
            size = self._rows(tokens, stride, heads * rotation.head_size)
            regions.append((x, size, True))
        pointers = (ctypes.c_void_p * 2)(query, key)
        self._call(2, regions, bytes(pointers) + bytes(rotation))

    def _rows(self, count: int, stride: int, width: int) -> int:
        return self._size * ((count - 1) * stride + width) if count > 0 else 0

    def _blocks(self, layer: Any, last: int) -> int:
        size = last * layer.block_stride + layer.num_kv_heads * layer.head_stride
        return self._size * size if last >= 0 else 0

    def _rules(self, layer: Any) -> list[tuple[int, int, bool]]:
        size = 4 * layer.num_heads
        return [(layer.alibi_slopes, size, False), (layer.sinks, size, False)]

    def _call(
        self, function: int, regions: list[tuple[int | None, int, bool]], arguments: bytes
    ) -> None:
        regions = _joined([region for region in regions if region[0] is not None])
        to, back = self._process.stdin, self._process.stdout
        to.write(bytes((ctypes.c_int64 * 2)(function, len(regions))))
        for address, size, is_written in regions:
            to.write(bytes((ctypes.c_uint64 * 3)(address, size, is_written)))
            to.write(ctypes.string_at(address, size))
        to.write(arguments)
        to.flush()
        for address, size, is_written in regions:
            if is_written:
                content = back.read(size)
                if len(content) != size:
                    raise RuntimeError(f"the emulated process ended: {self._process.wait()}")
                ctypes.memmove(address, content, size)


def _without_tensors(layer: Any) -> Any:
    """A copy of what is said of a layer, without this step's tensors and its cache."""
    copy = type(layer).from_buffer_copy(layer)
    copy.query = copy.output = copy.kv_cache = None
    return copy


def _joined(regions: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """Regions that don't overlap: rows of two tensors may lie between each other."""
    joined: list[tuple[int, int, bool]] = []
    for region in sorted(regions):
        if not joined or region[0] >= joined[-1][0] + joined[-1][1]:
            joined.append(region)
            continue
        begin, size, is_written = joined.pop()
        end = max(begin + size, region[0] + region[1])
        joined.append((begin, end - begin, is_written or region[2]))
    return joined


if __name__ == "__main__":
    compiler, emulator, folder, *tests = sys.argv[1:]
    kernel.load = functools.cache(lambda dtype: Emulated(dtype, compiler, emulator, Path(folder)))
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *tests]))
