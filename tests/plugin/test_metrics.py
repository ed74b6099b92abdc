"""When an engine's numbers are read, and over which groups of layers."""

from types import SimpleNamespace

import pytest

from tests.plugin.kv_cache.simulation import Simulation, make_spec
from vllm_lminf import plugin
from vllm_lminf.plugin import metrics
from vllm_lminf.plugin.archive import ArchiveManager
from vllm_lminf.plugin.metrics import (
    ARCHIVE_HELD,
    ARCHIVE_SIZE,
    BLOCKS_FREED,
    BLOCKS_PINNED,
    SEARCHES,
    SEARCHES_REPEATED,
    TOKENS_OUTSIDE,
    Meter,
)

PROMPT = list(range(40))


@pytest.fixture
def simulation() -> Simulation:
    """n_global 5, n_local 8, blocks of 4: two are pinned. A real pool and a real manager."""
    plugin.register()
    return Simulation(make_spec(5, 8, 4), num_blocks=20, max_in_flight=8)


def run(simulation: Simulation) -> None:
    request = simulation.request(PROMPT)
    assert simulation.run(request, max_new=8) is not None
    assert request.num_computed_tokens == 40


def test_a_busy_engine_is_read_now_and_then_and_an_idle_one_at_once(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "INTERVAL_S", 1e9)
    meter = Meter([simulation.manager])
    assert meter.read(simulation.running) == {BLOCKS_PINNED: 0, BLOCKS_FREED: 0, TOKENS_OUTSIDE: 0}
    run(simulation)
    assert meter.read(simulation.running) == {}
    monkeypatch.setattr(metrics, "INTERVAL_S", 0)
    # The last step computed 32 to 39: before it, blocks 2 to 5 were behind the window of 32, which
    # starts at 25. The next query, at 40, sees 0 to 4 and 33 to 39.
    busy = {BLOCKS_PINNED: 2, BLOCKS_FREED: 4, TOKENS_OUTSIDE: 28}
    assert meter.read(simulation.running) == busy
    monkeypatch.setattr(metrics, "INTERVAL_S", 1e9)
    assert meter.read(simulation.running) == {}
    (request,) = simulation.running.values()
    simulation.free(request)
    idle = {BLOCKS_PINNED: 0, BLOCKS_FREED: 0, TOKENS_OUTSIDE: 0}
    assert meter.read(simulation.running) == idle


def test_layers_with_windows_of_their_own(simulation: Simulation) -> None:
    """A token that one of the groups still sees is not outside; each group's blocks count."""
    own = Simulation(make_spec(0, 20, 4), num_blocks=20, max_in_flight=8)
    run(simulation)
    run(own)
    requests = simulation.running
    (request_id,) = requests
    assert list(own.running) == [request_id]
    numbers = Meter([simulation.manager, own.manager]).read(requests)
    # Positions 0 to 4 and 21 to 39 are seen; of the second group, 0 to 12 are behind its window.
    assert numbers == {BLOCKS_PINNED: 2, BLOCKS_FREED: 4 + 3, TOKENS_OUTSIDE: 40 - 5 - 19}


def test_searches_are_told_once(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's counts grow; a reading tells what is new."""
    monkeypatch.setattr(metrics, "INTERVAL_S", 0)
    archive = object.__new__(ArchiveManager)
    archive.kv_cache_spec = SimpleNamespace(num_pages=9)
    archive.block_pool = SimpleNamespace(get_num_free_blocks=lambda: 5)
    meter = Meter([simulation.manager, archive])
    told = []
    for counts in ([0, 0], [10, 1], [10, 1], [25, 1]):
        meter.searches = counts
        numbers = meter.read({})
        assert (numbers[ARCHIVE_HELD], numbers[ARCHIVE_SIZE]) == (3, 8)
        told.append((numbers[SEARCHES], numbers[SEARCHES_REPEATED]))
    assert told == [(0, 0), (10, 1), (0, 0), (15, 0)]


def test_an_engine_without_a_lambda_is_not_read() -> None:
    assert Meter([object()]).read({}) == {}
