"""How many searches of the middle a worker's kernels made, read without waiting for the device.

Only kernels whose searches may have to go over a part of the index again count them:
`vllm_lminf.kernels.base.Kernel.search_counts`.
"""

import time
from collections.abc import Iterable

import torch

INTERVAL_S = 0.1
"""Least time between two readings."""


class SearchCounts:
    """Those of an engine, in one of its workers.

    The device is asked for its counts behind all that it has been given to do, and they are taken
    once they have come: what is read is some steps old.
    """

    latest_step: "SearchCounts | None" = None
    """Those of the engine whose step was described last in this process."""

    def __init__(self, counts: Iterable[torch.Tensor]) -> None:
        """
        Args:
            counts: int64 [2] each: searches, and those of them that weren't certain at once.
        """
        self._counts = list(counts)
        self._copies = [
            torch.zeros(2, dtype=torch.int64, pin_memory=each.is_cuda) for each in self._counts
        ]
        self._event = torch.cuda.Event() if any(each.is_cuda for each in self._counts) else None
        self._is_asked, self._next_asking = False, 0.0
        self._known = [0, 0]

    def read(self) -> list[int]:
        """Searches so far, and those of them that weren't certain at once, as far as is known.

        Called between steps: not while a graph is captured.
        """
        if self._is_asked and (self._event is None or self._event.query()):
            self._known = torch.stack(self._copies).sum(dim=0).tolist()
            self._is_asked = False
        now = time.monotonic()
        if not self._is_asked and now >= self._next_asking:
            for copy, counts in zip(self._copies, self._counts, strict=True):
                copy.copy_(counts, non_blocking=True)
            if self._event is not None:
                self._event.record()
            self._is_asked, self._next_asking = True, now + INTERVAL_S
        return self._known
