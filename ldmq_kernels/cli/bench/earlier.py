"""The files of `ldmq bench --op`: JSON that a later run compares itself with, and CSV."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ldmq_kernels.cli.bench.measure import Ceilings, Result
from ldmq_kernels.files import csv_bytes, read_json, shortened
from ldmq_kernels.version import __version__

SAME = ("op", "shape", "backend", "dtype", "epilogue", "cache")  # what two rows that are compared have in common
FIRST_COLUMNS = ("op", "shape", "backend", "tile", "dtype", "epilogue", "cache")  # of a table
MACHINE = ("device", "threads", "torch", "version")


def machine(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on beside the op."""
    is_gpu = device.type == "cuda"
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": __version__,
    }


def is_json(path: Path) -> bool:
    """Whether a file is what --json wrote, which a later run may replace."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"rows", "ceilings", *MACHINE} <= set(content)


def is_table(path: Path) -> bool:
    """Whether a file is what --csv wrote, which a later run may replace."""
    beginning = ",".join(FIRST_COLUMNS).encode()
    try:
        with path.open("rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


def json_of(results: Sequence[Result], ceilings: Ceilings, device: torch.device) -> bytes:
    """What was measured as `read_rows` reads it."""
    head = {**machine(device), "date": datetime.date.today().isoformat(), "ceilings": asdict(ceilings)}
    content = {**head, "rows": [result.as_dict() for result in results]}
    return (json.dumps(content, indent=1) + "\n").encode()


def table_of(results: Sequence[Result]) -> bytes:
    """What was measured as CSV, a line for each op, shape and backend."""
    rows = [result.as_dict() for result in results]
    return csv_bytes(list(rows[0]), [list(row.values()) for row in rows])


def key_of(row: Mapping[str, Any]) -> Hashable:
    """What tells which rows of two files are the same measurement."""
    return tuple(row[name] for name in SAME)


def read_rows(path: Path, device: torch.device) -> tuple[dict[Hashable, dict[str, Any]], list[str]]:
    """The rows of an earlier file.

    Args:
        path: a file that --json wrote.
        device: of this run.

    Returns:
        The rows by `key_of`, and in words how the machine of that run differs from this one.

    Raises:
        ValueError: there is no such file, or --json did not write it.
    """
    try:
        content = read_json(path)
        rows = {key_of(row): row for row in content["rows"]}
        for row in rows.values():
            float(row["p50_ms"]), float(row["noise"])
        then = {name: content[name] for name in MACHINE}
    except FileNotFoundError:
        raise ValueError(
            f"--compare: there is no file {path}: `ldmq bench --op ... --json {path}` writes one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--compare: {path} is no file of `ldmq bench --op ... --json` ({shortened(repr(error))})"
        ) from None
    now = machine(device)
    return rows, [f"{name} was {then[name]}, is {now[name]}" for name in MACHINE if then[name] != now[name]]
