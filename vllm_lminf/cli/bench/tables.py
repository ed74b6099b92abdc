"""Tables as plain data, printed on a terminal or written as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Table:
    """A titled table. The first ``num_keys`` columns say what a row is about."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_keys: int = 1

    def print(self, console: Console) -> None:
        """Print it; LMINF's columns are coloured."""
        import rich.table
        from rich.box import HORIZONTALS

        table = rich.table.Table(
            title=self.title,
            box=HORIZONTALS,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
        )
        for column, name in enumerate(self.head):
            table.add_column(
                name,
                justify="left" if column < self.num_keys else "right",
                no_wrap=True,
                style="cyan" if "LMINF" in name else None,
            )
        for index, row in enumerate(self.rows):
            following = self.rows[index + 1 : index + 2]
            is_last = self.num_keys > 1 and any(row[0] != after[0] for after in following)
            table.add_row(*row, end_section=is_last)
        console.print(table)
        console.print()

    def beside(self, other: Table) -> Table:
        """One table with the columns of both, about the same rows."""
        rows = [a + b[self.num_keys :] for a, b in zip(self.rows, other.rows, strict=True)]
        return Table(self.title, self.head + other.head[self.num_keys :], rows, self.num_keys)

    def markdown(self) -> str:
        """The same for a Markdown document, without the title."""
        head = (name.replace("\n", " ") for name in self.head)
        rule = ("---" if c < self.num_keys else "---:" for c in range(len(self.head)))
        return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *self.rows))


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, and never an exponent."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - len(str(int(abs(rounded)))))
    if abs(rounded) < 1:
        decimals = max(0, digits - 1 - int(f"{rounded:e}".partition("e")[2]))
    return f"{rounded:.{decimals}f}"
