"""Tables as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from ldmq_kernels.files.outputs import write_whole


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A table as CSV in UTF-8: a header and a line for each row, None as an empty field.

    Raises:
        ValueError: a row has more or fewer values than there are columns.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} values, {row!r}, in a table of {len(columns)} columns")
        writer.writerow(row)
    return text.getvalue().encode()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table as `csv_bytes` has it, whole or not at all.

    Raises:
        OSError: as `write_whole`.
        ValueError: as `csv_bytes`.
    """
    write_whole(path, csv_bytes(columns, rows))
