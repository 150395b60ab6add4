"""Results: rows as they come, a file for each device, day and kind, and the newest of these.

A row belongs to an op and a shape, or to a model; of one that was measured several times the last counts, of a model
the last of those with the most forms.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import machine
from ldmq_kernels.files import check_place

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
OPS = tuple(sorted(path.stem for path in (ROOT / "benchmarks" / "ops").glob("[!_]*.py")))
Row = dict[str, Any]


@functools.cache
def _machine() -> dict[str, Any]:
    return machine()


# -- rows --------------------------------------------------------------------------------------------------


def append(path: Path, what: str, row: Row) -> None:
    """Add a row of the results `what` to a file of JSON lines; after this it survives whatever happens."""
    line = json.dumps({"what": what, "machine": _machine(), "row": row})
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Iterator[dict[str, Any]]:
    """All rows of a file, each with "what" and "machine"; a last line that was cut off is left out."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def latest(rows: Iterable[Row]) -> list[Row]:
    """One row for each op, shape and name, in the order of their first ones."""
    kept: dict[str, Row] = {}
    for row in rows:
        key = json.dumps([row.get("op"), row.get("shape"), row.get("name")])
        if key not in kept or _forms(row) >= _forms(kept[key]):
            kept[key] = row
    return list(kept.values())


def _forms(row: Row) -> int:
    """In how many forms a model was measured."""
    return len(row["ms"]) if isinstance(row.get("ms"), dict) else 0


# -- files -------------------------------------------------------------------------------------------------


def path_of(what: str, record: dict[str, Any]) -> Path:
    """results/<device>/<date>-<what>.json"""
    folder = "".join(c if c.isalnum() else "-" for c in record["device"].split("(")[0].strip()).lower()
    return RESULTS / folder / f"{record['date']}-{what}.json"


def summary_of(what: str, rows: list[Row]) -> dict[str, float]:
    """What the rows say in short: their own summaries, and an op's benchmark's."""
    found: dict[str, float | None] = {}
    for row in rows:
        found |= row.get("summary", {})
    if what in OPS:
        module = importlib.import_module(f"benchmarks.ops.{what}")
        found |= module.summary(rows) if hasattr(module, "summary") else {}
    return {key: value for key, value in found.items() if value is not None}


def write(path: Path, rows: list[Row], summary: dict[str, Any], record: dict[str, Any] | None = None) -> Path:
    """Write a results file.

    Args:
        summary: its figures by key; None is left out.
        record: the machine's, and whatever belongs beside it; of this machine unless given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in summary.items() if value is not None}
    path.write_text(json.dumps({**(record or _machine()), "rows": rows, "summary": kept}, indent=1) + "\n")
    return path


def keep(what: str, rows: list[Row], summary: dict[str, Any], record: dict[str, Any] | None = None) -> Path:
    """Write a results file to its place in `RESULTS`, which docs/results.md is made from."""
    return write(path_of(what, record or _machine()), rows, summary, record)


def check_keep(what: str) -> None:
    """Before anything is measured: refuse a place to which `keep` could not write.

    Raises:
        OSError: it cannot be written; its text says so.
    """
    check_place(path_of(what, _machine()))


def collect(found: Iterable[dict[str, Any]]) -> list[Path]:
    """Write a file for each device, date and kind among rows as `read` gives them."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in found:
        machine = entry["machine"]
        groups.setdefault((machine["device"], machine["date"], entry["what"]), []).append(entry)
    paths = []
    for (_, _, what), entries in groups.items():
        rows = latest(entry["row"] for entry in entries)
        paths.append(keep(what, rows, summary_of(what, rows), entries[-1]["machine"]))
    return paths


def kind_of(path: Path) -> str:
    """What a results file holds, by its name."""
    return re.sub(r"^\d{4}-\d{2}-\d{2}-", "", path.stem)


def newest() -> dict[tuple[str, str], Path]:
    """The newest file of each kind and device folder."""
    files = sorted(RESULTS.glob("*/*.json"))
    return {(kind_of(path), path.parent.name): path for path in files}


# -- where a command's rows go -----------------------------------------------------------------------------


@dataclass
class Output:
    """Where the rows of one kind go; every file is whole after each row, since a run may be cut short."""

    what: str
    json: Path | None = None
    lines: Path | None = None
    recorded: bool = False
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, what: str, options: argparse.Namespace) -> Output:
        """Do what the options of `add_options` say.

        Raises:
            OSError: a file that would be written cannot be.
        """
        output = cls(what, options.json, options.rows, options.record)
        for path in output.files:
            check_place(path)
        return output

    @property
    def files(self) -> list[Path]:
        """What is written, apart from the terminal."""
        placed = [path_of(self.what, _machine())] if self.recorded else []
        return [path for path in (self.json, *placed, self.lines) if path is not None]

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows = latest([*self.rows, row])
        for path in self.files:
            if path == self.lines:
                append(path, self.what, row)
            else:
                write(path, self.rows, summary_of(self.what, self.rows))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where results go."""
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results, with the machine's record, there")
    parser.add_argument("--record", action="store_true", help="write them to benchmarks/results/<device>, for the docs")
    parser.add_argument("--rows", type=Path, help="append each row to this file of JSON lines")
