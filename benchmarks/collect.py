"""Make results files of the rows that a GPU machine brought home: python -m benchmarks.collect ROWS.jsonl

Of a shape that was measured several times the last row counts, so tuned tiles replace the first ones; of a model,
the last of those with the most forms. Rows of different devices and dates go to different files.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import common, rows


def collect(found: Iterable[dict[str, Any]]) -> list[Path]:
    """Write a file for each device, date and kind of result."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for entry in found:
        machine = entry["machine"]
        group = groups.setdefault((machine["device"], machine["date"], entry["what"]), {})
        row = entry["row"]
        key = json.dumps([row.get("op"), row.get("shape"), row.get("name")])
        if key not in group or _forms(row) >= _forms(group[key]["row"]):
            group[key] = entry
    paths = []
    for (_, _, what), entries in groups.items():
        measured = [entry["row"] for entry in entries.values()]
        summary: dict[str, Any] = {}
        for row in measured:
            summary |= row.get("summary", {})
        if importlib.util.find_spec(f"benchmarks.bench_{what}"):
            module = importlib.import_module(f"benchmarks.bench_{what}")
            summary |= module.summary(measured) if hasattr(module, "summary") else {}
        record = list(entries.values())[-1]["machine"]
        paths.append(common.write_results(what, measured, summary, record))
    return paths


def _forms(row: dict[str, Any]) -> int:
    """In how many forms a model was measured."""
    return len(row["ms"]) if isinstance(row.get("ms"), dict) else 0


def main() -> None:
    """Print the files that were written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    print(*collect(rows.read(parser.parse_args().rows)), sep="\n")


if __name__ == "__main__":
    main()
