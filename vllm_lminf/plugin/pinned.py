"""Host memory that a GPU reads and writes itself: pinned, and seen through a view on the device.

A program on the device that loads from the view fetches over the bus, and what it stores is in the
host's memory once its launch has ended. Launches behind it on the stream see it.
"""

import weakref

import torch

from vllm_lminf.errors import UnsupportedError


def device_view(memory: torch.Tensor, owner: object, setting: str) -> torch.Tensor:
    """Pins memory until its owner is gone, and returns a view of it on the current device.

    It is pinned where it lies: torch's own allocator of pinned memory would take up to twice as
    much, and never give it back. Pinning fetches every page, which takes seconds for some GiB.

    Args:
        memory: on the host; contiguous, and at the start of a page.
        owner: nobody uses the view when it is gone.
        setting: what to set lower where this fails.

    Returns:
        Of memory's shape and dtype.

    Raises:
        UnsupportedError: the memory can't be pinned.
    """
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    # With unified addresses what is registered is mapped, too.
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if error.value == 0:
        weakref.finalize(owner, _unpin, memory).atexit = False
    # Of memory that isn't pinned, vLLM would make a copy that is.
    if error.value != 0 or not memory.is_pinned():
        raise UnsupportedError(
            [
                f"{setting}, and {memory.nbytes / (1 << 30):.2f} GiB of host memory can't be "
                f"pinned for the device (cudaHostRegister: {error}); set it lower, or have the "
                "system allow more: a container's memory limit, or ulimit -l"
            ]
        )
    view: torch.Tensor = get_accelerator_view_from_cpu_tensor(memory)
    return view


def _unpin(memory: torch.Tensor) -> None:
    """At the end of a process the driver does it."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
