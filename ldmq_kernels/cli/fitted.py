"""Tables that never cut a number: a narrow terminal gets fewer columns, a very narrow one a line for each value."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 10_000  # a file or another program gets whole lines
LEAST_FLEXIBLE = 12  # characters of a column that may wrap


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        rank: 0 for a column that always stays; of the others the one with the highest rank goes first.
        is_number: whether its values stand at the right.
        wraps: whether its text may take several lines.
    """

    title: str
    rank: int = 0
    is_number: bool = True
    wraps: bool = False


Row = Sequence[str | Text]


def output_console() -> Console:
    """A console on standard output, as wide as the terminal or the variable COLUMNS; unlimited into a pipe."""
    given = os.environ.get("COLUMNS", "")
    if given.isdigit() and int(given) > 0:
        return Console(width=int(given))
    return Console(width=shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED_WIDTH)


def say(text: str) -> None:
    """Print a line that may hold a path: no brackets are taken for markup, and nothing is broken into lines."""
    output_console().print(text, markup=False, highlight=False, soft_wrap=True)


def _table(columns: Sequence[Column], rows: Sequence[Row], most: int | None) -> Table:
    """The table as rich has it; `most` limits a text that wraps, so that what is measured is the least width."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.is_number else "left"
        if column.wraps:
            table.add_column(column.title, justify=justify, overflow="fold", max_width=most)
        else:
            table.add_column(column.title, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def _least_width(columns: Sequence[Column], rows: Sequence[Row]) -> int:
    wide = Console(width=PIPED_WIDTH)
    return Measurement.get(wide, wide.options, _table(columns, rows, LEAST_FLEXIBLE)).maximum


def print_fitted(
    console: Console,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
) -> tuple[str, ...]:
    """Print a table in which every value that is shown is whole.

    Args:
        console: where to.
        title: a line above.
        columns: of the widest form.
        rows: a value for each column; a text has its own style.

    Returns:
        The titles of the columns that were left out.
    """
    shown = list(range(len(columns)))

    def picked(row: Row) -> Row:
        return [row[index] for index in shown]

    def width() -> int:
        return _least_width([columns[index] for index in shown], [picked(row) for row in rows])

    while width() > console.width and any(columns[index].rank for index in shown):
        shown.remove(max(shown, key=lambda index: (columns[index].rank, index)))
    kept = [columns[index] for index in shown]
    console.print(title, markup=False, highlight=False)
    if width() <= console.width:
        console.print(_table(kept, [picked(row) for row in rows], None))
        return tuple(column.title for index, column in enumerate(columns) if index not in shown)
    for row in rows:
        console.print()
        for column, cell in zip(columns, row, strict=True):
            console.print(Text.assemble(f"{column.title} ", cell), highlight=False, soft_wrap=True)
    return ()
