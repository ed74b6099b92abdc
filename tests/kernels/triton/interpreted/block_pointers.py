"""Block pointers for the interpreter of a Triton that has none any more, from 3.9 on.

xformers' split-KV kernel is written with them. What they mean is taken from Triton 3.8's
documentation; with that version the tests that use this run on its own.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import triton
import triton.language as tl


@dataclass(frozen=True)
class _BlockPointer:
    base: Any
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    offsets: tuple[Any, ...]
    block_shape: tuple[int, ...]

    def places(self, boundary_check: tuple[int, ...]) -> tuple[Any, Any]:
        """Pointers of the block, and which of them are inside the boundaries that are checked."""
        pointers, mask = self.base, None
        for dim, size in enumerate(self.block_shape):
            index = (self.offsets[dim] + tl.arange(0, size)).to(tl.int64)
            index = index[:, None] if dim == 0 and len(self.block_shape) == 2 else index
            index = index[None, :] if dim == 1 else index
            pointers = pointers + index * self.strides[dim]
            if dim in boundary_check:
                is_inside = index < self.shape[dim]
                mask = is_inside if mask is None else mask & is_inside
        if mask is not None:
            mask = mask & tl.full(self.block_shape, 1, tl.int1)
        return pointers, mask


def _make_block_ptr(
    base: Any, shape: Any, strides: Any, offsets: Any, block_shape: Any, order: Any
) -> _BlockPointer:
    sizes = tuple(int(tl.core._unwrap_if_constexpr(size)) for size in block_shape)
    return _BlockPointer(base, tuple(shape), tuple(strides), tuple(offsets), sizes)


def _advance(pointer: _BlockPointer, offsets: Any) -> _BlockPointer:
    moved = (here + by for here, by in zip(pointer.offsets, offsets, strict=True))
    return replace(pointer, offsets=tuple(moved))


_LOAD, _STORE = tl.load, tl.store


def _load(pointer: Any, *args: Any, boundary_check: Any = (), **kwargs: Any) -> Any:
    if isinstance(pointer, _BlockPointer):
        pointer, mask = pointer.places(boundary_check)
        kwargs.update(mask=mask, other=None if mask is None else 0.0)
    return _LOAD(pointer, *args, **kwargs)


def _store(pointer: Any, *args: Any, boundary_check: Any = (), **kwargs: Any) -> Any:
    if isinstance(pointer, _BlockPointer):
        pointer, mask = pointer.places(boundary_check)
        kwargs.update(mask=mask)
    return _STORE(pointer, *args, **kwargs)


# Functions with this mark are given the interpreter's own argument.
for _function in (_load, _store):
    setattr(_function, tl.core.TRITON_BUILTIN, True)


def bring_back(patch: pytest.MonkeyPatch) -> None:
    """Gives the interpreter block pointers, unless it has its own."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        return
    for name, function in (
        ("make_block_ptr", _make_block_ptr),
        ("advance", _advance),
        ("load", _load),
        ("store", _store),
    ):
        patch.setattr(tl, name, function, raising=False)
