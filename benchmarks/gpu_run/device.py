"""What this GPU machine is, one row: python -m benchmarks device --rows ROWS.jsonl"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine, results

ASKED = (
    "driver_version",
    "vbios_version",
    "memory.total",
    "memory.used",
    "clocks.max.sm",
    "power.limit",
    "mig.mode.current",
)


def facts() -> dict[str, Any]:
    """Python, processors and nvidia-smi's words for the GPU, and whether torch computes on it."""
    row: dict[str, Any] = {"name": "device", "python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    if machine.device().type != "cuda":
        return row | {"outcome": "missing", "detail": "there is no CUDA device that torch can use"}
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    row |= dict(zip(ASKED, machine.query(*ASKED), strict=False))
    row |= {"free_bytes": free, "total_bytes": total, "multiprocessors": properties.multi_processor_count}
    row["capability"] = f"{properties.major}.{properties.minor}"
    works = float(torch.ones(1000, device="cuda").sum()) == 1000
    return row | {"outcome": "ok" if works else "wrong"}


def main(arguments: list[str]) -> int:
    """Print the row; 1 where there is no GPU that computes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks device", description=__doc__)
    parser.add_argument("--rows", type=Path, help="append the row to this file of JSON lines")
    options = parser.parse_args(arguments)
    row = facts()
    if options.rows:
        results.append(options.rows, "device", row)
    print(*(f"{name}: {value}" for name, value in row.items()), sep="\n")
    return int(row["outcome"] != "ok")
