"""Makes Triton's interpreter round and multiply as GPUs do."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

_TYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}


def _convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
    """Converts by way of torch; returns bits, as the function that it replaces."""
    x = torch.from_numpy(np.ascontiguousarray(data)).view(_TYPES[source]).to(_TYPES[target])
    return x.view(getattr(torch, f"int{8 * x.itemsize}")).numpy()


@pytest.fixture(autouse=True, scope="session")
def faithful_interpreter() -> Iterator[None]:
    """Two faults of Triton 3.8's interpreter are repaired:

    - Conversions to bfloat16 cut digits off, those to float8 round wrongly (triton-lang/triton
      issue 8322, "triton.language.cast from float16 to float8e5 produces different output when
      TRITON_INTERPRET=1").
    - Products of bfloat16 are formed of its bit patterns (issue 11584, "Interpreter: `tl.dot` on
      bfloat16 inputs multiplies the raw bit patterns"; closed: the interpreter doesn't support
      bfloat16 yet).
    """
    dot = interpreter.InterpreterBuilder.create_dot

    def multiply(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            data = (_convert(x.data, tl.bfloat16, tl.float32, None) for x in (a, b))
            a, b = (interpreter.TensorHandle(x.view(np.float32), tl.float32) for x in data)
        return dot(self, a, b, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", _convert)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply)
        yield
