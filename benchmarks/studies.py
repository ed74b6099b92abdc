"""What studies have in common: results as JSON, and their tables between the marks of a page."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from vllm_lminf.cli.machine import machine, versions

BEGIN, END = "<!-- measured -->", "<!-- measured end -->"


def table(
    frame: pd.DataFrame, keys: Mapping[str, str], columns: Mapping[str, "pd.Series[str]"]
) -> str:
    """A Markdown table.

    Args:
        frame: a row for every row of the table.
        keys: by column of the frame what it is headed with: the first columns, as they are.
        columns: text by heading: the other columns.
    """
    cells = pd.DataFrame({head: frame[name] for name, head in keys.items()} | dict(columns))
    align = ["left"] * len(keys) + ["right"] * len(columns)
    text: str = cells.to_markdown(index=False, disable_numparse=True, colalign=align)
    return text


def publish(
    page: Path,
    data: Mapping[str, Any],
    tables: Callable[[dict[str, Any]], Iterator[tuple[str, str]]],
) -> None:
    """Writes results.json into the folder named like the page, and the tables between the page's
    marks."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{page} has lost the marks between which the tables stand")
    known = {**data, "versions": versions(), "machine": machine()}
    results = page.with_suffix("") / "results.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    parts = [f"**{title}**\n\n{cells}" for title, cells in tables(known)]
    page.write_text("\n\n".join([before + BEGIN, *parts, END + after]), encoding="utf-8")
    print(*parts, f"Written: {results}, {page}", sep="\n\n")
