"""Times functions that take turns, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

TRIALS = 3
"""Calls of every function before the first round."""


def seconds_of_a_call(run: Callable[[], object], repeats: int) -> float:
    """The mean of so many calls, by the host's clock."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def time_in_turns(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    turn_seconds: float,
    on_round: Callable[[], None],
    clock: Callable[[Callable[[], object], int], float] = seconds_of_a_call,
) -> dict[str, list[float]]:
    """Return the seconds of one call of each function, in every round.

    A turn repeats its function until about ``turn_seconds`` have passed. Every round begins with
    another function, so that none always follows the same one. ``clock`` gives the mean seconds of
    so many calls.
    """
    repeats = {name: _repeats(run, turn_seconds, clock) for name, run in runs.items()}
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(clock(runs[name], repeats[name]))
        on_round()
    return seconds


def _repeats(
    run: Callable[[], object],
    turn_seconds: float,
    clock: Callable[[Callable[[], object], int], float],
) -> int:
    """How often to call a function in a turn, by its fastest call: one may be interrupted."""
    return max(1, round(turn_seconds / min(clock(run, 1) for _ in range(TRIALS))))
