"""Results as they come: one line of JSON for each, with the machine that gave it, appended at once."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import machine


@functools.cache
def _machine() -> dict[str, Any]:
    return machine()


def append(path: Path, what: str, row: dict[str, Any]) -> None:
    """Add a row of the results `what` to a file; after this it survives whatever happens."""
    line = json.dumps({"what": what, "machine": _machine(), "row": row})
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Iterator[dict[str, Any]]:
    """All rows of a file; a last line that was cut off is left out."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
