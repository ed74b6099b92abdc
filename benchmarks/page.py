"""Writes docs/benchmarks.md: between its marks, the tables of every results file beside it.

A results file in docs/benchmarks is what `benchmarks.kernels` or `benchmarks.engines` wrote there
with --output; its picture lies beside it.
"""

import json
import sys
from pathlib import Path

from benchmarks import engines, kernels

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: written by `make bench` -->", "<!-- measured end -->"
PROGRAMS = {"kernels": kernels, "engines": engines}


def section(results: Path) -> str:
    """A results file as Markdown, its picture last."""
    data = json.loads(results.read_text(encoding="utf-8"))
    program = PROGRAMS[data["program"]]
    parts = [f"### {results.stem}", *program.notes(data)]
    for title, cells in program.tables(data):
        parts += [f"{title}:", cells]
    picture = results.with_suffix(".png")
    return "\n\n".join([*parts, f"![{results.stem}]({results.parent.name}/{picture.name})"])


def write(page: Path = PAGE) -> None:
    """Puts the sections between the page's marks; they are of the folder named like the page."""
    found = sorted(page.with_suffix("").glob("*.json"))
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not found:
        sys.exit(f"{page.with_suffix('')} holds no results: run `make bench`")
    if not begin or not end:
        sys.exit(f"{page} has lost the marks between which the tables stand")
    text = "\n\n".join([before + BEGIN, *map(section, found), END + after])
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
