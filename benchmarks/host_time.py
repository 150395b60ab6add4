"""Microseconds that the host spends on a call of each op, the GPU's work left out: python -m benchmarks.host_time

On a GPU the calls are queued behind a long wait, so that none of them waits for the device; on a CPU the ops
compute as well, on one token or pixel, and the figure is an upper bound of the dispatch.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, rows
from benchmarks.machine import device
from ldmq_kernels import ops
from ldmq_kernels.cli.op_cases import Cases

CALLS = 100
WAIT = 100_000_000  # clocks


def microseconds(op: str) -> float:
    """Of one call, on small operands."""
    on = device()
    arguments = Cases(on, torch.float16 if on.type == "cuda" else torch.float32).of(op)
    function = getattr(ops, op)
    with torch.inference_mode():
        for _ in range(5):
            function(*arguments)
        if on.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(WAIT)
        begin = time.perf_counter()
        for _ in range(CALLS):
            function(*arguments)
        taken = time.perf_counter() - begin
        if on.type == "cuda":
            torch.cuda.synchronize()
    return taken / CALLS * 1e6


def main() -> None:
    """Print a line for each op, and write or append one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    found = {op: microseconds(op) for op in ops.SCHEMAS}
    for op, value in found.items():
        print(f"{op:26} {value:8.1f} us")
    summary = {"host/us_per_op": sum(found.values()) / len(found)}
    row: dict[str, Any] = {"name": "host time", "us": found, "summary": summary}
    if options.rows:
        rows.append(options.rows, "host_time", row)
    else:
        print(common.write_results("host_time", [row], summary))


if __name__ == "__main__":
    main()
