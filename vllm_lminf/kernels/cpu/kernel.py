"""Λ-attention over a paged KV cache by compiled kernels for CPUs; `csrc/` holds their source.

The keys and values of a block are stored in an order of the kernels' own (`csrc/cache.h`):
`write_cache` and `lambda_attention` of this module belong together. What is computed is what
`vllm_lminf.kernels.reference` computes.
"""

import ctypes
import functools
from typing import Any, ClassVar

import torch

from vllm_lminf.kernels.base import ScoreRules
from vllm_lminf.kernels.cpu.build import load_library
from vllm_lminf.kernels.reference import FarRotations
from vllm_lminf.pattern import LambdaPattern, cdiv

_LANES = 16
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
    ]


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
    library = load_library(_DTYPES[dtype])
    batch, layer = ctypes.POINTER(_Batch), ctypes.POINTER(_Layer)
    for function, arguments in (
        (library.lminf_attention, (batch, layer)),
        (library.lminf_write_cache, (layer, *(_POINTER, _INT64) * 2, _POINTER, _INT64)),
        (library.lminf_rotate, (_POINTER, _POINTER, ctypes.POINTER(_Rotation))),
    ):
        function.argtypes, function.restype = arguments, None
    return library


def serves(dtype: torch.dtype, head_size: int) -> bool:
    """Whether the kernels can handle heads of this kind."""
    return dtype in _DTYPES and head_size % _LANES == 0


class CpuBatch:
    """A batch under one Λ, as the kernels want it; the same for all layers that share both.

    Args:
        query_start_loc: int32 [num_requests + 1]: request r owns the query rows from
            ``query_start_loc[r]`` to ``query_start_loc[r + 1]``, its latest tokens.
        seq_lens: int32 [num_requests]: tokens in the cache, these queries' own included.
        block_table: int32 [num_requests, max_blocks]. Entries of blocks that were freed are never
            read.
        pattern: the Λ.
        far: rotations for the far pairs; None where the model rotates nothing.
    """

    def __init__(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        pattern: LambdaPattern,
        far: FarRotations | None,
    ) -> None:
        for tensor in (query_start_loc, seq_lens, block_table):
            if tensor.dtype != torch.int32 or tensor.device.type != "cpu" or tensor.stride(-1) != 1:
                raise TypeError("the kernels take a batch as int32 tensors on the CPU")
        if len(query_start_loc) != len(seq_lens) + 1 or len(block_table) < len(seq_lens):
            raise ValueError("query_start_loc, seq_lens and block_table differ in their requests")
        self._keep = [query_start_loc, seq_lens, block_table]
        self.struct = _Batch(
            query_start_loc=query_start_loc.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            block_table=block_table.data_ptr(),
            block_table_stride=block_table.stride(0),
            num_requests=len(seq_lens),
            n_global=pattern.n_global,
            n_local=pattern.n_local,
            distance_limit=pattern.distance_limit,
        )
        if far is not None and pattern.n_global > 0:
            self._set_rotations(far)

    def _set_rotations(self, far: FarRotations) -> None:
        num_global = len(far.key_cos)
        key_stride = cdiv(num_global, _LANES) * _LANES
        query_cos, query_sin = far.query_cos.contiguous(), far.query_sin.contiguous()
        key_cos, key_sin = (
            torch.nn.functional.pad(x.T, (0, key_stride - num_global)).contiguous()
            for x in (far.key_cos, far.key_sin)
        )
        self._keep += [query_cos, query_sin, key_cos, key_sin]
        self.struct.query_cos, self.struct.query_sin = query_cos.data_ptr(), query_sin.data_ptr()
        self.struct.key_cos, self.struct.key_sin = key_cos.data_ptr(), key_sin.data_ptr()
        self.struct.key_stride = key_stride
        self.struct.rotary_half = query_cos.shape[1]
        self.struct.is_neox_style = far.is_neox_style


class CpuLayer:
    """One layer's kernels: what stays the same from step to step is put together once.

    Args:
        num_heads: query heads.
        num_kv_heads: key heads; divides num_heads.
        head_size: a multiple of 16.
        dtype: of queries, cache and output: float32, float16 or bfloat16.
        rules: how products become scores.

    Raises:
        ValueError: the kernels don't serve such heads.
        BuildError: they can't be compiled here.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        rules: ScoreRules,
    ) -> None:
        if not serves(dtype, head_size) or num_heads % num_kv_heads != 0:
            raise ValueError(
                f"{num_heads} heads over {num_kv_heads} of {head_size} dimensions in {dtype}: the "
                "kernels take multiples of 16 in float32, float16 or bfloat16"
            )
        self._library = load(dtype)
        self._dtype = dtype
        self._struct = _Layer(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            scale=rules.scale,
            softcap=rules.softcap or 0.0,
        )
        self._keep = []
        for name in ("alibi_slopes", "sinks"):
            values = getattr(rules, name)
            if values is not None:
                values = values.detach().to(torch.float32).contiguous()
                self._keep.append(values)
                setattr(self._struct, name, values.data_ptr())
        self._argument = ctypes.byref(self._struct)

    def serves(self, block_size: int, dtype: torch.dtype) -> bool:
        """Whether the kernels can handle a cache in blocks of so many tokens and of this dtype."""
        return block_size % _LANES == 0 and dtype == self._dtype

    def _check_rows(self, x: torch.Tensor) -> None:
        """Rows may lie apart; the heads of a row lie next to each other."""
        if x.dtype != self._dtype or x.stride()[1:] != (x.shape[2], 1):
            raise ValueError(
                f"{x.dtype} with strides {x.stride()}: the kernels were built for {self._dtype} "
                "with heads next to each other"
            )

    def _point_to_cache(self, kv_cache: torch.Tensor) -> None:
        struct = self._struct
        struct.kv_cache = kv_cache.data_ptr()
        struct.block_stride, struct.head_stride = kv_cache.stride(0), kv_cache.stride(1)
        struct.block_size = kv_cache.shape[2]

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores keys and values in their slots.

        Args:
            key: shape [>= num_tokens, num_kv_heads, head_size]; rows past num_tokens are padding.
            value: same shape.
            kv_cache: shape [num_blocks, num_kv_heads, block_size, 2 * head_size]; written in
                place, in an order of the kernels' own.
            slot_mapping: int64 [num_tokens]: ``block * block_size + offset`` of every token, or a
                negative number for a token that has no slot.
        """
        self._check_rows(key)
        self._check_rows(value)
        self._point_to_cache(kv_cache)
        self._library.lminf_write_cache(
            self._argument,
            *(key.data_ptr(), key.stride(0)),
            *(value.data_ptr(), value.stride(0)),
            *(slot_mapping.data_ptr(), slot_mapping.shape[0]),
        )

    def lambda_attention(
        self, query: torch.Tensor, kv_cache: torch.Tensor, batch: CpuBatch, output: torch.Tensor
    ) -> None:
        """Attention of a batch of requests, prefill and decode mixed freely.

        Args:
            query: rotated by its true position; shape [num_tokens, num_heads, head_size].
            kv_cache: as `write_cache` filled it.
            batch: the batch.
            output: written in place; of query's shape.
        """
        self._check_rows(query)
        self._check_rows(output)
        self._point_to_cache(kv_cache)
        struct = self._struct
        struct.query, struct.query_stride = query.data_ptr(), query.stride(0)
        struct.output, struct.output_stride = output.data_ptr(), output.stride(0)
        self._library.lminf_attention(ctypes.byref(batch.struct), self._argument)


class CpuRotation:
    """The rotation of one step's queries and keys, the same for all layers that share it.

    Args:
        cos_sin: cosines, then sines; float32 [num_tokens, rotary_dim], contiguous, on the CPU.
        head_size: dimensions of a head; the leading rotary_dim of them are turned.
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

    def turn(self, query: torch.Tensor, key: torch.Tensor | None = None) -> None:
        """Turns the heads of every token in place, in float32 whatever their dtype.

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
