"""Makes Triton's interpreter round and multiply as GPUs do."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_NARROW = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_TYPES = {tl.float16: torch.float16, tl.float32: torch.float32, **_NARROW}


def _to_torch(handle: TensorHandle) -> torch.Tensor:
    data, dtype = np.ascontiguousarray(handle.data), _TYPES[handle.dtype.scalar]
    bits = torch.from_numpy(data.view(f"int{8 * data.itemsize}"))
    return bits.view(dtype)


def _from_torch(x: torch.Tensor, dtype: tl.dtype) -> TensorHandle:
    storage = interpreter._get_np_dtype(dtype)
    bits = x.to(_TYPES[dtype]).view(getattr(torch, f"int{8 * storage.itemsize}"))
    return TensorHandle(bits.numpy().view(storage), dtype)


@pytest.fixture(autouse=True, scope="session")
def faithful_interpreter() -> Iterator[None]:
    """The interpreter cuts digits off where GPUs round to bfloat16 and float8, and multiplies the
    bit patterns of bfloat16 as integers. Conversions go through torch instead."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def convert(self, src, dst_type, rounding_mode=None):  # type: ignore[no-untyped-def]
        types = {src.dtype.scalar, dst_type.scalar}
        if types <= _TYPES.keys() and types & _NARROW.keys():
            return _from_torch(_to_torch(src).float(), dst_type.scalar)
        return cast(self, src, dst_type)

    def multiply(self, a, b, d, *precision):  # type: ignore[no-untyped-def]
        if a.dtype.scalar == tl.bfloat16:
            a, b = (_from_torch(_to_torch(x).float(), tl.float32) for x in (a, b))
        return dot(self, a, b, d, *precision)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", convert)
        patch.setattr(InterpreterBuilder, "create_fp_to_fp", convert)
        patch.setattr(InterpreterBuilder, "create_dot", multiply)
        yield
