"""Host memory handed to a device, with a runtime of CUDA's that is made up."""

import gc
import mmap
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from vllm.utils import torch_utils

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.plugin import pinned


@dataclass
class Runtime:
    """CUDA's, as far as it is called."""

    error: int = 0
    registered: dict[int, int] = field(default_factory=dict)

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> SimpleNamespace:  # noqa: N802
        assert flags == 0
        if self.error == 0:
            self.registered[pointer] = size
        return SimpleNamespace(value=self.error)

    def cudaHostUnregister(self, pointer: int) -> None:  # noqa: N802
        del self.registered[pointer]


class Owner:
    """Of the memory."""


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """The view on the device is one on the host's memory."""
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: x.data_ptr() in runtime.registered)
    monkeypatch.setattr(torch_utils, "get_accelerator_view_from_cpu_tensor", lambda x: x.view_as(x))
    return runtime


@pytest.fixture
def memory() -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, 3 * 100), dtype=torch.uint8).view(3, 100)


def test_pinned_as_long_as_its_owner_lives(runtime: Runtime, memory: torch.Tensor) -> None:
    owner, pointer = Owner(), memory.data_ptr()
    view = pinned.device_view(memory, owner, "archive_gib is 1")
    assert view.shape == (3, 100)
    assert view.data_ptr() == pointer
    assert runtime.registered == {pointer: 300}
    del memory, view
    gc.collect()
    assert runtime.registered == {pointer: 300}
    del owner
    gc.collect()
    assert runtime.registered == {}


def test_what_can_not_be_pinned_is_refused(runtime: Runtime, memory: torch.Tensor) -> None:
    runtime.error = 2
    with pytest.raises(UnsupportedError, match=r"archive_gib is 1, and .* can't be pinned .*lower"):
        pinned.device_view(memory, Owner(), "archive_gib is 1")


def test_no_copy_takes_its_place(
    runtime: Runtime, memory: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM makes of memory that torch doesn't know to be pinned."""
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: False)
    with pytest.raises(UnsupportedError, match="can't be pinned"):
        pinned.device_view(memory, Owner(), "archive_gib is 1")
    gc.collect()
    assert runtime.registered == {}
