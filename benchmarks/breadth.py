"""Every pipeline planned through its own calls and quantized, kept as a results file: python -m benchmarks breadth

One row a pipeline of `python_tests/breadth`: the real classes of diffusers on small random models. Each is planned by
`ldmq.plan(pipe, calls=...)`, quantized, called again from another seed, saved and loaded. A row is ok where the plan
holds what was asked for on its held-out call, the quantized pipeline comes within 3 dB of it at calls of other seeds,
and what is loaded gives the same bits. Figures of
random models tell that a path is right, and nothing of pictures.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.machine import machine
from benchmarks.harness.tables import markdown

FORMATS = ("w8a8-static", "w8a8-dynamic", "fp16")
TARGET_DB, OTHER_SEEDS_DB = 20.0, 3.0
WHAT = "breadth"
NOT_RUN, FOR_THE_TARGET = "not run by these calls", "by the plan, for its dB"
HEAD = [
    "pipeline",
    "convolutions",
    "linears",
    "MACs in 8 bits",
    "held out, dB",
    "other seeds, dB",
    "processor s (planning)",
    "in float",
]


def measure(name: str) -> dict[str, Any]:
    """One row of the results file, in a process of its own."""
    import torch

    from python_tests.breadth.matrix import all_rows
    from python_tests.breadth.measure import measured

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    start = time.process_time()
    row: dict[str, Any] = {"op": WHAT, "shape": name, "name": name}
    try:
        asked = all_rows()[name]
        found = measured(asked, TARGET_DB, FORMATS, calls=2 if asked.is_large else 3)
    except Exception as error:
        return row | {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    summary = found.summary
    kinds = {f"{kind}, no scheme": len(modules) for kind, modules in summary.without_scheme.items()}
    layers = [module for module in summary.in_float if module.has_scheme]
    why = Counter(NOT_RUN if module.name in found.not_run else FOR_THE_TARGET for module in layers)
    return row | {
        "ok": found.held_out_db >= TARGET_DB and found.called_db >= TARGET_DB - OTHER_SEEDS_DB and found.is_reloaded,
        "convolutions": [summary.quantized_convolutions, summary.convolutions],
        "linears": [summary.quantized_linears, summary.linears],
        "share_of_fp16": summary.bytes_after / summary.bytes_before,
        "held_out_db": found.held_out_db,
        "called_db": found.called_db,
        "drawn_db": found.drawn_db,
        "share_in_8_bits": found.share_in_8_bits,
        "reloaded": found.is_reloaded,
        "in_float": kinds | dict(why),
        "planning_seconds": round(found.planning_seconds, 1),
        "seconds": round(time.process_time() - start, 1),
    }


def _in_words(in_float: dict[str, int]) -> str:
    return "; ".join(f"{count} {why}" for why, count in in_float.items()) or "nothing"


def _seconds(row: dict[str, Any]) -> str:
    """Of the whole row, and of planning, which earlier files do not have alone."""
    alone = f" ({row['planning_seconds']:.1f})" if "planning_seconds" in row else ""
    return f"{row['seconds']:.1f}{alone}"


def models_table(data: dict[str, Any]) -> str:
    """The whole matrix as Markdown, for docs/models.md."""
    lines = []
    for row in sorted(data["rows"], key=lambda row: row["name"]):
        if "error" in row:
            lines.append([row["name"], *[""] * (len(HEAD) - 2), f"fails: {row['error']}"])
            continue
        counts = [f"{done} of {total}" if total else "-" for done, total in (row["convolutions"], row["linears"])]
        asked = "" if row["ok"] else ", below what was asked for"
        lines.append(
            [
                row["name"],
                *counts,
                f"{100 * row['share_in_8_bits']:.0f} %",
                f"{row['held_out_db']:.1f}",
                f"{row['called_db']:.1f}{asked}",
                _seconds(row),
                _in_words(row["in_float"]),
            ]
        )
    return f"{markdown(HEAD, lines)}\n\n{_states_table(data)}"


def _states_table(data: dict[str, Any]) -> str:
    """Rows and right ones of each time that the matrix was run, the oldest first."""
    now = {"date": data["date"], "commit": data["commit"], "rows": len(data["rows"])}
    now["ok"] = sum(row["ok"] for row in data["rows"])
    lines = [
        [state["date"], str(state["commit"])[:10], f"{state['ok']} of {state['rows']}"]
        for state in [*data.get("earlier", []), now]
    ]
    return markdown(["the matrix at", "commit", "rows right"], lines)


def earlier_runs(before: str | None) -> list[dict[str, Any]]:
    """Date, commit, rows and right rows of every results file of the matrix that git knows, the oldest first.

    Of a commit that was measured several times the last file counts.

    Args:
        before: the commit that is measured now, which is left out.
    """
    pattern = f"benchmarks/results/*/*-{WHAT}.json"
    git = ["git", "-C", str(results.ROOT)]
    log = subprocess.run(
        [*git, "log", "--reverse", "--diff-filter=AM", "--format=%H", "--name-only", "--", f":(glob){pattern}"],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, dict[str, Any]] = {}
    commit = ""
    for line in log.stdout.split():
        if "/" not in line:
            commit = line
            continue
        shown = subprocess.run([*git, "show", f"{commit}:{line}"], capture_output=True, text=True, check=True)
        data = json.loads(shown.stdout)
        right = sum(row["ok"] for row in data["rows"])
        measured_at = str(data["commit"])
        found[measured_at] = {"date": data["date"], "commit": measured_at, "rows": len(data["rows"]), "ok": right}
    return [run for measured_at, run in found.items() if measured_at != before]


def table(data: dict[str, Any]) -> str:
    """What the results file says in short."""
    rows = data["rows"]
    right = sum(row["ok"] for row in rows)
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    return "\n\n".join(
        [
            f"**Pipelines planned through their own calls** ({TARGET_DB:g} dB asked of small random models; "
            "[docs/models.md](models.md) has the rows)",
            markdown(["rows", "right", "processor seconds"], [[str(len(rows)), str(right), f"{seconds:.0f}"]]),
        ]
    )


def _each(names: list[str], workers: int, keep: Path | None) -> list[dict[str, Any]]:
    """The rows in the order of their names; those that `keep` has are taken from it, and the others added to it."""
    kept = [entry["row"] for entry in results.read(keep)] if keep is not None and keep.exists() else []
    found: dict[str, dict[str, Any]] = {row["name"]: row for row in kept if row["name"] in names}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_measured_by(), name): name for name in names if name not in found}
        for done in as_completed(waiting):
            row = found[waiting[done]] = done.result()
            if keep is not None:
                results.append(keep, WHAT, row)
            told = row.get("error") or f"{row['called_db']:.1f} dB, {row['seconds']} s"
            print(f"{len(found)} of {len(names)} {'ok   ' if row['ok'] else 'WRONG'} {row['name']}: {told}", flush=True)
    return [found[name] for name in names]


def _measured_by() -> Callable[[str], dict[str, Any]]:
    """The function as a process that is spawned finds it, also where this module runs as a command."""
    from benchmarks.breadth import measure as found

    return found


def main(arguments: list[str]) -> int:
    """Run the matrix, write the results file, and give 1 where a row is not right."""
    from python_tests.breadth.matrix import all_rows

    parser = argparse.ArgumentParser(prog="python -m benchmarks breadth", description=__doc__)
    parser.add_argument("--row", action="append", help="only rows whose name holds this text; nothing is written")
    parser.add_argument("--keep", type=Path, help="JSON lines that rows are added to, and those that are there kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    options = parser.parse_args(arguments)
    wanted = [name for name in all_rows() if not options.row or any(text in name for text in options.row)]
    wanted.sort(key=lambda name: all_rows()[name].is_large)
    rows = _each(wanted, options.workers, options.keep)
    right = sum(row["ok"] for row in rows)
    print(f"{right} of {len(rows)} rows ok")
    if options.row:
        print(json.dumps(rows, indent=1))
    else:
        summary = {"breadth/rows": len(rows), "breadth/ok": right}
        record = machine()
        record["earlier"] = earlier_runs(record["commit"])
        print(f"written: {results.keep(WHAT, rows, summary, record)}")
    return int(right < len(rows))
