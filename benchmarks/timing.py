"""Checks and clocks: nothing wrong is timed, and whatever is compared takes turns in one run."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[], object]
Clock = Callable[[Run, int], float]
"""The mean seconds of so many calls."""

TRIALS = 3
"""Calls of every contender before the first round, by the fastest of which its turns are sized."""

_FLUSH_BYTES = 2**28  # more than any device caches
_SLEEP_CYCLES = 2_000_000  # about a millisecond, in which the host hands over all launches


class WrongResultError(RuntimeError):
    """A contender computes something else than it should: nothing of it is timed."""


def check(name: str, error: float, tolerance: float) -> None:
    """Refuses an error that is larger than rounding explains.

    Raises:
        WrongResultError: it is larger, or NaN.
    """
    if not error <= tolerance:
        raise WrongResultError(
            f"{name} is off by {error:.2g}, and no more than {tolerance:.2g} can be rounding: "
            "nothing of it is timed"
        )


def host_clock(run: Run, repeats: int) -> float:
    """Seconds by the host's clock, for calls that return when they are done.

    `torch.utils.benchmark.Timer.timeit` makes two more calls before every measurement: here, where
    contenders have been called and a turn may be one call of seconds, they would triple a run.
    """
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


class DeviceClock:
    """Seconds by a CUDA device's own clock, each call with nothing in the L2 cache.

    The cache is flushed by reading. `triton.testing.do_bench` flushes it by writing, and the dirty
    lines that this leaves are written back while the call is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.float32, device=device)

    def __call__(self, run: Run, repeats: int) -> float:
        pairs = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.max()
            torch.cuda._sleep(_SLEEP_CYCLES)
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / repeats / 1000


def time_in_turns(
    runs: Mapping[str, Run],
    *,
    rounds: int,
    turn_seconds: float,
    clock: Clock,
    on_round: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Times calls of all contenders in turns, so that ratios hold on a machine that drifts.

    A turn repeats its call until about ``turn_seconds`` have passed; with 0 it is one call, and
    nothing is tried before. Every round begins with another contender, so that none always follows
    the same one.

    Returns:
        A record for every contender and round: contender, round, seconds of a call.
    """
    repeats = dict.fromkeys(runs, 1)
    if turn_seconds > 0:
        for name, run in runs.items():
            fastest = min(clock(run, 1) for _ in range(TRIALS))
            repeats[name] = max(1, round(turn_seconds / fastest))
    names, records = list(runs), []
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = clock(runs[name], repeats[name])
            records.append({"contender": name, "round": number, "seconds": seconds})
        on_round()
    return records
