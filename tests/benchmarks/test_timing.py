"""Turns, checks and clocks."""

import pytest
import torch

from benchmarks.timing import TRIALS, DeviceClock, WrongResultError, check, time_in_turns


def test_everyone_has_a_turn_and_nobody_is_always_first() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    ends: list[int] = []
    records = time_in_turns(
        runs,
        rounds=4,
        turn_seconds=0.0,
        clock=lambda run, repeats: float(run() is None),
        on_round=lambda: ends.append(len(calls)),
    )
    assert calls == list("abcbcacababc")
    assert ends == [3, 6, 9, 12]
    assert records[3] == {"contender": "b", "round": 1, "seconds": 1.0}
    assert {(r["contender"], r["round"]) for r in records} == {
        (name, number) for name in "abc" for number in range(4)
    }


def test_a_turn_repeats_a_call_until_its_time_has_passed() -> None:
    """By the fastest of the trials: one may be interrupted."""
    asked: list[int] = []

    def clock(run: object, repeats: int) -> float:
        asked.append(repeats)
        return 5.0 if len(asked) == 1 else 0.25

    time_in_turns({"a": lambda: None}, rounds=2, turn_seconds=1.0, clock=clock)
    assert asked == [1] * TRIALS + [4, 4]


@pytest.mark.parametrize("error", [0.1, float("nan"), float("inf")])
def test_what_is_wrong_is_not_timed(error: float) -> None:
    check("it", 0.01, 0.01)
    with pytest.raises(WrongResultError, match=r"it is off by .*: nothing of it is timed"):
        check("it", error, 0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_device_counts() -> None:
    """A sleep of ten million cycles takes longer than one of a million, by about ten."""
    clock = DeviceClock(torch.device("cuda"))
    short, long = (clock(lambda n=n: torch.cuda._sleep(n), 3) for n in (10**6, 10**7))
    assert 5 < long / short < 20
