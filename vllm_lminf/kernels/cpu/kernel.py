"""Λ-attention over a paged KV cache by compiled kernels for CPUs; `csrc/` holds their source.

The keys and values of a block are stored in an order of the kernels' own (`csrc/cache.h`). What is
computed is what `vllm_lminf.kernels.reference` computes.
"""

import ctypes
import functools
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, ClassVar

import torch

from vllm_lminf.errors import BuildError
from vllm_lminf.kernels.archive import RecallBatch
from vllm_lminf.kernels.base import DeviceBatch, Kernel, LayerConfig, PagedCache, Rotation
from vllm_lminf.kernels.cpu import build
from vllm_lminf.kernels.host_batch import HostBatch, InverseRotations
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import cdiv

logger = logging.getLogger("vllm.lminf")

_LANES = 16
_AMX_DEPTH = 32  # `kDepth` of csrc/amx.h
_ALIGNMENT = 64  # bytes, of an archive's pages
_MAX_INDEXED = 512  # `kMaxCodedSize` of csrc/codes.h
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_POINTER, _INT64, _INT32, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Batch(ctypes.Structure):
    """`LminfBatch` of csrc/interface.h."""

    _fields_: ClassVar = [
        ("query_start_loc", _POINTER),
        ("seq_lens", _POINTER),
        ("block_table", _POINTER),
        ("block_table_stride", _INT64),
        ("num_requests", _INT64),
        ("n_global", _INT64),
        ("n_local", _INT64),
        ("distance_limit", _INT64),
        ("query_cos", _POINTER),
        ("query_sin", _POINTER),
        ("key_cos", _POINTER),
        ("key_sin", _POINTER),
        ("key_stride", _INT64),
        ("rotary_half", _INT64),
        ("is_neox_style", _INT32),
    ]


class _Layer(ctypes.Structure):
    """`LminfLayer` of csrc/interface.h."""

    _fields_: ClassVar = [
        ("query", _POINTER),
        ("query_stride", _INT64),
        ("output", _POINTER),
        ("output_stride", _INT64),
        ("kv_cache", _POINTER),
        ("block_stride", _INT64),
        ("head_stride", _INT64),
        ("num_heads", _INT64),
        ("num_kv_heads", _INT64),
        ("head_size", _INT64),
        ("block_size", _INT64),
        ("alibi_slopes", _POINTER),
        ("sinks", _POINTER),
        ("scale", _FLOAT),
        ("softcap", _FLOAT),
        ("use_amx", _INT32),
    ]


class _Recall(ctypes.Structure):
    """`LminfRecall` of csrc/interface.h."""

    _fields_: ClassVar = [
        ("block_table", _POINTER),
        ("block_table_stride", _INT64),
        ("slots", _POINTER),
        ("num_tokens", _INT64),
        ("first_rows", _POINTER),
        ("key_cos", _POINTER),
        ("key_sin", _POINTER),
        ("query_cos", _POINTER),
        ("query_sin", _POINTER),
        ("rotary_half", _INT64),
        ("top_k", _INT64),
        ("unit_size", _INT64),
        ("is_neox_style", _INT32),
    ]


class _Archive(ctypes.Structure):
    """`LminfArchive` of csrc/interface.h."""

    _fields_: ClassVar = [("pages", _POINTER), ("page_bytes", _INT64), ("block_size", _INT64)]


class _Rotation(ctypes.Structure):
    """`LminfRotation` of csrc/interface.h."""

    _fields_: ClassVar = [
        ("cos_sin", _POINTER),
        ("num_tokens", _INT64),
        ("rotary_half", _INT64),
        ("head_size", _INT64),
        ("query_stride", _INT64),
        ("num_heads", _INT64),
        ("key_stride", _INT64),
        ("num_kv_heads", _INT64),
        ("is_neox_style", _INT32),
    ]


@functools.cache
def load(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels compiled for what is stored in this dtype, with their signatures.

    Raises:
        BuildError: they can't be compiled here.
    """
    library = build.load_library(_DTYPES[dtype])
    library.lminf_ask_for_amx.argtypes, library.lminf_ask_for_amx.restype = (), _INT32
    batch, layer = ctypes.POINTER(_Batch), ctypes.POINTER(_Layer)
    recall, archive = ctypes.POINTER(_Recall), ctypes.POINTER(_Archive)
    for function, arguments in (
        (library.lminf_attention, (batch, layer)),
        (library.lminf_attend_and_recall, (batch, layer, recall, archive)),
        (library.lminf_write_archive, (layer, recall, archive, *(_POINTER, _INT64) * 2)),
        (library.lminf_write_cache, (layer, *(_POINTER, _INT64) * 2, _POINTER, _INT64)),
        (library.lminf_rotate, (_POINTER, _POINTER, ctypes.POINTER(_Rotation))),
    ):
        function.argtypes, function.restype = arguments, None
    return library


@functools.cache
def has_amx(dtype: torch.dtype) -> bool:
    """Whether this process may multiply by AMX what is stored in this dtype; the system is asked.

    Raises:
        BuildError: the kernels can't be compiled here.
    """
    answer = load(dtype).lminf_ask_for_amx()
    if answer < 0:
        logger.warning(
            "prefill runs without AMX, and slower: the system refuses it to this process (%s)",
            os.strerror(-answer),
        )
    return bool(answer == 1)


class CpuBatch:
    """A batch under one Λ, as the kernels want it; the same for all layers that share both.

    Args:
        batch: on the CPU, in int32.
        layer: one of the layers.
    """

    def __init__(self, batch: DeviceBatch, layer: LayerConfig) -> None:
        host = HostBatch.of(batch)
        query_start_loc, seq_lens, table = host.query_start_loc, host.seq_lens, batch.block_table
        for tensor in (query_start_loc, seq_lens, table):
            if tensor.dtype != torch.int32 or tensor.device.type != "cpu" or tensor.stride(-1) != 1:
                raise TypeError("the kernels take a batch as int32 tensors on the CPU")
        if len(query_start_loc) != len(seq_lens) + 1 or len(table) < len(seq_lens):
            raise ValueError("query_start_loc, seq_lens and block_table differ in their requests")
        self._keep = [query_start_loc, seq_lens, table]
        self.struct = _Batch(
            query_start_loc=query_start_loc.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            block_table=table.data_ptr(),
            block_table_stride=table.stride(0),
            num_requests=len(seq_lens),
            n_global=layer.pattern.n_global,
            n_local=layer.pattern.n_local,
            distance_limit=layer.pattern.distance_limit,
        )
        if layer.far_rotation is not None:
            self._set_rotations(host.inverse_rotations(layer.far_rotation, layer.pattern))
        self.argument = ctypes.byref(self.struct)

    def _set_rotations(self, inverse: InverseRotations) -> None:
        num_global = len(inverse.key_cos)
        key_stride = cdiv(num_global, _LANES) * _LANES
        query_cos, query_sin = inverse.query_cos.contiguous(), inverse.query_sin.contiguous()
        key_cos, key_sin = (
            torch.nn.functional.pad(x.T, (0, key_stride - num_global)).contiguous()
            for x in (inverse.key_cos, inverse.key_sin)
        )
        self._keep += [query_cos, query_sin, key_cos, key_sin]
        self.struct.query_cos, self.struct.query_sin = query_cos.data_ptr(), query_sin.data_ptr()
        self.struct.key_cos, self.struct.key_sin = key_cos.data_ptr(), key_sin.data_ptr()
        self.struct.key_stride = key_stride
        self.struct.rotary_half = query_cos.shape[1]
        self.struct.is_neox_style = inverse.is_neox_style


class CpuRecall:
    """What a batch recalls, as the kernels want it; the same for all layers that share the Λ, the
    rotation, and what they recall.

    Args:
        batch: on the CPU.
        recall: on the CPU.
        layer: one of the layers, with a middle.
    """

    def __init__(self, batch: DeviceBatch, recall: RecallBatch, layer: LayerConfig) -> None:
        middle, rotation = layer.middle, layer.rotation
        if middle is None:
            raise ValueError("the layer has no middle to recall")
        host = HostBatch.of(batch)
        table, slots, first_rows = recall.block_table, recall.slot_mapping, recall.first_rows
        tensors = ((table, torch.int32), (slots, torch.int64), (first_rows, torch.int32))
        for tensor, dtype in tensors:
            if tensor.dtype != dtype or tensor.device.type != "cpu" or tensor.stride(-1) != 1:
                raise TypeError(
                    "the kernels take an archive's batch on the CPU: slots as int64, all else as "
                    "int32"
                )
        num_requests, num_tokens = len(host.seq_lens), int(host.query_start_loc[-1])
        if len(table) < num_requests or len(first_rows) < num_requests or len(slots) < num_tokens:
            raise ValueError("block_table, first_rows or slot_mapping lacks some of the batch")
        self.recall = recall
        self._keep: list[torch.Tensor] = []
        self.struct = _Recall(
            block_table=table.data_ptr(),
            block_table_stride=table.stride(0),
            slots=slots.data_ptr(),
            num_tokens=num_tokens,
            first_rows=first_rows.data_ptr(),
            top_k=middle.top_k,
            unit_size=middle.block_size,
        )
        if rotation is not None:
            self._set_rotations(rotation, host.positions, middle.distance)
        self.argument = ctypes.byref(self.struct)

    def _set_rotations(self, rotation: Rotation, positions: torch.Tensor, distance: int) -> None:
        """Keys turn back by their positions, queries on to the distance, or back to it."""
        key_cos, key_sin = rotation.tables(positions)
        turn = distance - positions
        query_cos, query_sin = rotation.tables(turn.abs())
        sines = -key_sin, torch.where(turn[:, None] < 0, -query_sin, query_sin)
        angles = [x.contiguous() for x in (key_cos, sines[0], query_cos, sines[1])]
        self._keep += angles
        struct = self.struct
        struct.key_cos, struct.key_sin, struct.query_cos, struct.query_sin = (
            x.data_ptr() for x in angles
        )
        struct.rotary_half = key_cos.shape[1]
        struct.is_neox_style = rotation.is_neox_style


class CpuKernel(Kernel):
    """One layer's kernels: what stays the same from step to step is put together once."""

    recalls = True

    @classmethod
    def unsupported_reasons(cls, layer: LayerConfig) -> list[str]:
        heads = layer.heads
        table = (
            (layer.device.type != "cpu", f"it runs on CPUs, not on {layer.device.type}"),
            (
                heads.dtype not in _DTYPES or heads.head_size % _LANES != 0,
                "it takes heads of a multiple of 16 dimensions in float32, float16 or bfloat16, "
                f"not {heads.head_size} in {_name(heads.dtype)}",
            ),
            (
                layer.block_size % _LANES != 0,
                f"it takes blocks of a multiple of 16 tokens, not --block-size {layer.block_size}; "
                "set --block-size 128",
            ),
            (
                layer.cache_dtype != heads.dtype,
                f"it keeps the cache in the model's dtype, not in {_name(layer.cache_dtype)}",
            ),
        )
        reasons = [reason for applies, reason in table if applies]
        return reasons + ([] if layer.middle is None else _middle_reasons(layer, layer.middle))

    @classmethod
    def unavailable_reasons(cls, layer: LayerConfig) -> list[str]:
        if layer.device.type == "cpu" and layer.heads.dtype in _DTYPES:
            try:
                build.load_library(_DTYPES[layer.heads.dtype])
            except BuildError as error:
                return [str(error)]
        return []

    @classmethod
    def start_loading(cls, layer: LayerConfig) -> None:
        build.start(_DTYPES[layer.heads.dtype])

    def __init__(self, layer: LayerConfig) -> None:
        heads, rules, far = layer.heads, layer.rules, layer.far_rotation
        if heads.head_size % _LANES != 0 or heads.num_heads % heads.num_kv_heads != 0:
            raise ValueError(f"{heads}: the kernels take multiples of 16 dimensions, and groups")
        library = load(heads.dtype)
        self._attend, self._write = library.lminf_attention, library.lminf_write_cache
        self._attend_and_recall = library.lminf_attend_and_recall
        self._write_archive = library.lminf_write_archive
        self._layer = layer
        self._dtype, self._inner_strides = heads.dtype, (heads.head_size, 1)
        self._struct = _Layer(
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_size=heads.head_size,
            scale=rules.scale,
            softcap=rules.softcap or 0.0,
            use_amx=heads.head_size % _AMX_DEPTH == 0 and has_amx(heads.dtype),
        )
        self.variant = "prefill by AMX" if self._struct.use_amx else ""
        self._keep = []
        for name in ("alibi_slopes", "sinks"):
            values = getattr(rules, name)
            if values is not None:
                values = values.detach().to(torch.float32).contiguous()
                self._keep.append(values)
                setattr(self._struct, name, values.data_ptr())
        self._argument = ctypes.byref(self._struct)
        self._cache: Callable[[], PagedCache | None] = lambda: None
        # Numbers: they are looked up at every step.
        rotation = () if far is None else (id(far.tables), far.is_neox_style)
        self._batch_key = ("cpu", *astuple(layer.pattern), *rotation)
        if layer.middle is not None:
            turned = layer.rotation
            rotation = () if turned is None else (id(turned.tables), turned.is_neox_style)
            self._recall_key = ("cpu recall", *astuple(layer.middle), *rotation)
            self._page_bytes = layer.archive_format.page_bytes
            self._archive = _Archive(page_bytes=self._page_bytes, block_size=layer.block_size)
            self._archive_argument = ctypes.byref(self._archive)

    def temporary_bytes(self, num_tokens: int, max_requests: int) -> int:
        """Of the units that queries recall; with them come some for each thread."""
        middle, heads = self._layer.middle, self._layer.heads
        if middle is None:
            return 0
        lists = heads.num_heads if middle.block_size == 1 else heads.num_kv_heads
        rows = min(num_tokens, max_requests * middle.rows)
        return rows * lists * (middle.top_k * torch.int32.itemsize + torch.int64.itemsize)

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: PagedCache,
        slot_mapping: torch.Tensor,
    ) -> None:
        if cache is not self._cache():
            self._point_to(cache)
        self._write(
            self._argument,
            *self._rows(key),
            *self._rows(value),
            slot_mapping.data_ptr(),
            slot_mapping.shape[0],
        )

    def attend(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
    ) -> None:
        self._attend(self._prepare(query, cache, batch, output).argument, self._argument)

    def write_archive(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        archive: torch.Tensor,
        batch: DeviceBatch,
        recall: RecallBatch,
    ) -> None:
        told = self._told(batch, recall)
        self._point_to_archive(archive)
        self._write_archive(
            self._argument,
            told.argument,
            self._archive_argument,
            *self._rows(key),
            *self._rows(value),
        )

    def attend_and_recall(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DeviceBatch,
        archive: torch.Tensor,
        recall: RecallBatch,
        output: torch.Tensor,
    ) -> None:
        told = self._told(batch, recall)
        self._point_to_archive(archive)
        self._attend_and_recall(
            self._prepare(query, cache, batch, output).argument,
            self._argument,
            told.argument,
            self._archive_argument,
        )

    def _prepare(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
    ) -> CpuBatch:
        """Points to this step's rows, and describes its batch if no layer has done so."""
        told: CpuBatch | None = batch.shared.get(self._batch_key)
        if told is None:
            told = batch.shared[self._batch_key] = CpuBatch(batch, self._layer)
        if cache is not self._cache():
            self._point_to(cache)
        struct = self._struct
        struct.query, struct.query_stride = self._rows(query)
        struct.output, struct.output_stride = self._rows(output)
        return told

    def _told(self, batch: DeviceBatch, recall: RecallBatch) -> CpuRecall:
        """What is recalled, described if no layer has done so."""
        told: CpuRecall | None = batch.shared.get(self._recall_key)
        if told is None or told.recall is not recall:
            told = batch.shared[self._recall_key] = CpuRecall(batch, recall, self._layer)
        return told

    def _point_to_archive(self, archive: torch.Tensor) -> None:
        stride = archive.stride()
        if archive.dtype != torch.uint8 or stride[1:] != (1,):
            raise ValueError(f"{archive.dtype} with strides {stride}: an archive is rows of bytes")
        if archive.shape[1] != self._page_bytes or (archive.data_ptr() | stride[0]) % _ALIGNMENT:
            raise ValueError(
                f"pages of {archive.shape[1]} bytes, {stride[0]} apart, at {archive.data_ptr():#x}:"
                f" the kernels take {self._page_bytes} bytes, aligned to {_ALIGNMENT}"
            )
        self._archive.pages, self._archive.page_bytes = archive.data_ptr(), stride[0]

    def _point_to(self, cache: PagedCache) -> None:
        """Takes a cache in which a head's keys and values lie as `PagedCache.of` sees them."""
        key, value, struct = cache.key, cache.value, self._struct
        half = key.shape[2] * key.shape[3] * key.element_size()
        if key.dtype != self._dtype or key.shape[2] % _LANES != 0:
            raise ValueError(f"blocks of {key.shape[2]} in {key.dtype}: not what the kernels take")
        if value.data_ptr() - key.data_ptr() != half or value.stride() != key.stride():
            raise ValueError("the kernels take a cache in which a head's values follow its keys")
        struct.kv_cache, struct.block_size = key.data_ptr(), key.shape[2]
        struct.block_stride, struct.head_stride = key.stride()[:2]
        self._cache = weakref.ref(cache)

    def _rows(self, x: torch.Tensor) -> tuple[int, int]:
        """Where rows begin, and how far they lie apart; the heads of a row lie together."""
        stride = x.stride()
        if x.dtype != self._dtype or stride[1:] != self._inner_strides:
            raise ValueError(
                f"{x.dtype} with strides {stride}: the kernels were built for {self._dtype} with "
                "heads next to each other"
            )
        return x.data_ptr(), stride[0]


def _middle_reasons(layer: LayerConfig, middle: Middle) -> list[str]:
    """Why the kernels don't recall a layer's middle."""
    rules, head_size = layer.rules, layer.heads.head_size
    table = (
        (rules.alibi_slopes is not None, "it recalls no middle under ALiBi"),
        (rules.sinks is not None, "it recalls no middle beside attention sinks"),
        (layer.index_bits != 8, f"its index of the middle has 8 bits, not {layer.index_bits}"),
        (
            middle.block_size > 1 and middle.block_size % _LANES != 0,
            "it recalls single tokens, or blocks of a multiple of 16 tokens, not of "
            f"{middle.block_size}",
        ),
        (
            head_size > _MAX_INDEXED,
            f"it recalls keys of up to {_MAX_INDEXED} dimensions, not of {head_size}",
        ),
    )
    return [reason for applies, reason in table if applies]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class CpuRotation:
    """The rotation of one step's queries and keys, the same for all layers that share it.

    Args:
        cos_sin: cosines, then sines; float32 [num_tokens, rotary_dim], contiguous, on the CPU.
        head_size: dimensions of a head; the leading rotary_dim of them are rotated.
        is_neox_style: how pairs are laid out, see `vllm_lminf.rope.RotarySpec`.
    """

    def __init__(self, cos_sin: torch.Tensor, head_size: int, is_neox_style: bool) -> None:
        if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
            raise ValueError(f"cos_sin is {cos_sin.dtype}: it must be float32, and contiguous")
        self._keep = cos_sin
        self._struct = _Rotation(
            cos_sin=cos_sin.data_ptr(),
            num_tokens=cos_sin.shape[0],
            rotary_half=cos_sin.shape[1] // 2,
            head_size=head_size,
            is_neox_style=is_neox_style,
        )
        self._argument = ctypes.byref(self._struct)
        self._layout: tuple[object, ...] | None = None
        self._rotate: Any = None

    def rotate(self, query: torch.Tensor, key: torch.Tensor | None = None) -> None:
        """Rotates the heads of every token in place, in float32 whatever their dtype.

        Args:
            query: shape [num_tokens, num_heads * head_size] or [num_tokens, num_heads, head_size],
                the heads of a token next to each other; float32, float16 or bfloat16.
            key: the same for the key heads, or None.

        Raises:
            BuildError: the kernels can't be compiled here.
        """
        # One step's layers hand over tensors of one layout: it is looked at once.
        layout: tuple[object, ...] = query.dtype, query.shape, query.stride()
        if key is not None:
            layout = *layout, key.dtype, key.shape, key.stride()
        if layout != self._layout:
            self._set_layout(query, key)
            self._layout = layout
        self._rotate(query.data_ptr(), None if key is None else key.data_ptr(), self._argument)

    def _set_layout(self, query: torch.Tensor, key: torch.Tensor | None) -> None:
        struct = self._struct
        self._rotate = load(query.dtype).lminf_rotate
        struct.query_stride, struct.num_heads = self._rows(query, query.dtype)
        if key is not None:
            struct.key_stride, struct.num_kv_heads = self._rows(key, query.dtype)

    def _rows(self, x: torch.Tensor, dtype: torch.dtype) -> tuple[int, int]:
        """Elements from one token to the next, and heads."""
        head_size = self._struct.head_size
        stride, *inner = x.stride()
        if x.dtype != dtype or len(x) != self._struct.num_tokens:
            raise ValueError(f"{len(x)} rows in {x.dtype}: they don't fit the rotation's tokens")
        if len(inner) == 2 and x.shape[1] == 1:
            inner = inner[1:]  # a single head has no next one
        if inner != [1] and inner != [head_size, 1]:
            raise ValueError(f"strides {x.stride()}: the heads of a token must lie together")
        return stride, x[0].numel() // head_size if len(x) else 0
