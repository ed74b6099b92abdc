"""Counts on a device, read without waiting for it."""

from types import SimpleNamespace

import pytest
import torch

from vllm_lminf.plugin import search_counts
from vllm_lminf.plugin.search_counts import SearchCounts


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_counts, "INTERVAL_S", 0)


def test_of_all_kernels_together() -> None:
    """Those of the reading before."""
    kernels = [torch.tensor([5, 1]), torch.tensor([7, 0])]
    counts = SearchCounts(kernels)
    assert counts.read() == [0, 0]
    assert counts.read() == [12, 1]
    kernels[0] += 3
    assert counts.read() == [12, 1]
    assert counts.read() == [15, 4]


def test_what_has_not_come_is_not_waited_for() -> None:
    kernel = torch.tensor([5, 1])
    counts = SearchCounts([kernel])
    asked: list[bool] = []
    event = SimpleNamespace(query=lambda: False, record=lambda: asked.append(True))
    counts._event = event
    for _ in range(3):
        assert counts.read() == [0, 0]
    assert asked == [True]
    event.query = lambda: True
    assert counts.read() == [5, 1]
    assert asked == [True, True]


def test_the_device_is_asked_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = torch.tensor([5, 1])
    counts = SearchCounts([kernel])
    counts.read()
    monkeypatch.setattr(search_counts, "INTERVAL_S", 1e9)
    assert counts.read() == [5, 1]
    kernel += 1
    assert [counts.read() for _ in range(3)] == [[5, 1]] * 3
