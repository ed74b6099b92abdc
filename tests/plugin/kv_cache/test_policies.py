"""The manager follows policies that the package doesn't have."""

import random
from dataclasses import replace
from itertools import chain

import pytest

from tests.plugin.kv_cache.simulation import Simulation, make_spec
from tests.policies import WithMiddle, WithMiddleElsewhere
from vllm_lminf.pattern import LambdaPattern, Pattern, cdiv
from vllm_lminf.plugin.kv_cache import LambdaSpec

AROUND = LambdaPattern(n_global=3, n_local=8, distance_limit=10)
MIDDLE = WithMiddle(AROUND, range(22, 31), at=9)
ELSEWHERE = WithMiddleElsewhere(AROUND, range(22, 31), at=9)
PROMPT = list(range(1000, 1061))
"""61 tokens, of which 60 may come from the cache."""


def make_simulation(pattern: Pattern, num_blocks: int = 60) -> Simulation:
    spec: LambdaSpec = replace(make_spec(3, 8, 4), pattern=pattern)
    return Simulation(spec, num_blocks, max_in_flight=8)


@pytest.mark.parametrize(
    ("pattern", "held"),
    [
        # The last step starts at 56, whose window starts at 49.
        pytest.param(MIDDLE, [0, 5, 6, 7, 12, 13, 14, 15], id="middle"),
        pytest.param(ELSEWHERE, [0, 12, 13, 14, 15], id="elsewhere"),
        pytest.param(AROUND, [0, 12, 13, 14, 15], id="lambda"),
    ],
)
def test_what_a_request_holds(pattern: Pattern, held: list[int]) -> None:
    simulation = make_simulation(pattern)
    request = simulation.request(PROMPT)
    assert simulation.run(request, 8) == 0
    assert simulation.entries_held(request) == held
    assert len(held) <= simulation.cap


@pytest.mark.parametrize("middle", [range(22, 31), range(30, 30), range(3, 9)], ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_freed_is_what_no_later_query_sees(middle: range, block_size: int) -> None:
    pattern = WithMiddle(AROUND, middle, at=9)
    for computed in range(90):
        freed = [*chain(*pattern.freed_blocks(computed, block_size))]
        assert freed == [
            block
            for block in range(cdiv(computed, block_size) + 1)
            if not any(
                pattern.visible(i, j)
                for i in range(computed, computed + 2 * block_size)
                for j in range(block * block_size, (block + 1) * block_size)
            )
        ]


def test_bound_and_pinned_blocks() -> None:
    # Nine tokens of the middle are in four blocks at most, if they lie anywhere.
    assert MIDDLE.num_pinned_blocks(4) == 1
    assert MIDDLE.max_blocks_held(4, 8, 10**6) == AROUND.max_blocks_held(4, 8, 10**6) + 4
    assert ELSEWHERE.max_blocks_held(4, 8, 10**6) == AROUND.max_blocks_held(4, 8, 10**6)


@pytest.mark.parametrize(
    ("evicted", "hit"),
    [
        pytest.param([], 60, id="all-there"),
        pytest.param([1, 2, 3, 4, 8, 9, 10, 11, 12], 60, id="between-intervals"),
        pytest.param([14], 56, id="window"),
        pytest.param([6], 24, id="middle"),
        pytest.param([6, 4], 16, id="middle-and-the-window-before-it"),
        pytest.param([0], 0, id="pinned"),
    ],
)
def test_a_hit_needs_what_is_kept(evicted: list[int], hit: int) -> None:
    simulation = make_simulation(MIDDLE)
    first = simulation.request(PROMPT)
    simulation.run(first, 8)
    simulation.free(first)
    for entry in evicted:
        simulation.evict(first, entry)
    second = simulation.request(PROMPT)
    assert simulation.run(second, 8) == hit


@pytest.mark.parametrize("pattern", [MIDDLE, ELSEWHERE], ids=["middle", "elsewhere"])
@pytest.mark.parametrize("seed", range(20))
def test_requests_come_and_go(pattern: Pattern, seed: int) -> None:
    """Shared prefixes, steps of any length, preemption, a pool that is nearly full: the simulation
    checks every block at every step."""
    draw = random.Random(seed)
    simulation = make_simulation(pattern, num_blocks=2 * 12 + 6)
    waiting = [
        simulation.request(PROMPT[: draw.randint(1, 61)] + draw.choices(range(3), k=30))
        for _ in range(12)
    ]
    running = []
    num_hit = num_freed = 0
    while waiting or running:
        if waiting and len(running) < 2:
            hit = simulation.admit(waiting[0], draw.randint(1, 8))
            if hit is not None:
                num_hit += hit
                running.append(waiting.pop(0))
                simulation.settle(running[-1])
                continue
        request = draw.choice(running)
        ended = request.num_computed_tokens == request.num_tokens
        if ended or draw.random() < 0.02:
            simulation.free(request)
            running.remove(request)
            if not ended:
                waiting.append(request)
        elif simulation.step(request, draw.randint(1, 8)):
            simulation.settle(request)
        num_freed += simulation.manager.take_num_freed_blocks()
    assert num_hit > 0
    assert num_freed > 0
    assert simulation.num_free == simulation.num_blocks
