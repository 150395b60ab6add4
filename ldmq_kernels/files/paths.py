"""Paths whose names are not UTF-8, or not for this process's locale."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def printable(path: str | Path) -> str:
    """A path as text that any file and terminal in UTF-8 takes; bytes that are no UTF-8 become \\xff and so on."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def alias_in_ascii(folder: Path) -> Iterator[Path]:
    """A path that libraries take which want UTF-8: the folder itself, or a link to it where its name is not UTF-8."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="ldmq-") as place:
            link = Path(place) / "folder"
            link.symlink_to(folder.absolute())
            yield link
        return
    yield folder
