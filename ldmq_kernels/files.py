"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there once it is complete.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older file at `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise


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


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a scratch folder that becomes `path` when the block ends, and vanishes if it fails.

    Raises:
        FileExistsError: `path` is a file, or a folder that is not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already and is not empty: choose another place, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=path.name, suffix=".part"))
    try:
        yield part
        part.chmod(0o777 & ~_umask())
        if path.exists():
            path.rmdir()
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
