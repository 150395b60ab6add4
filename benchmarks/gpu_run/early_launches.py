"""Whether kernels that are launched early give equal results, and what that gains: python -m benchmarks early-launches

The chain of small ops of `ldmq doctor`, by Triton and by CUDA, in a process each: a kernel that waits for ever costs
its own row alone. What was found allows early launches in later jobs, or not, as the doctor does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_run.cases import FAILED, MISSING, OK, WRONG
from benchmarks.gpu_run.smoke import FINE, in_child
from benchmarks.harness import machine, results
from benchmarks.models.gpu import served, served_first
from ldmq_kernels.cli.early_launches import chain, compared, note
from ldmq_kernels.kernels.backend import backends
from ldmq_kernels.kernels.dependent_launch import FROM
from ldmq_kernels.kernels.gpu import gpu_of

BACKENDS = ("triton", "cuda")
SECONDS = 28.0  # of one backend; both are within the job's limit


@torch.inference_mode()
def compare(backend: str) -> dict[str, Any]:
    """The row of a backend that is offered every call first.

    Returns:
        Its outcome as `cases.check` names it and why; where results are equal, how many times as fast a CUDA graph is
        with early launches, and who served.
    """
    on, found = machine.device(), backends()[backend]
    row: dict[str, Any] = {"name": f"early launches by {backend}"}
    if not found.serves(on):
        return row | {"outcome": MISSING, "detail": found.why_not(on)}
    if on.type != "cuda" or gpu_of(on).capability < FROM:
        return row | {"outcome": MISSING, "detail": f"a device before {FROM // 10}.{FROM % 10} has no such launches"}
    with served_first(backend):
        call = chain(on)
        problem, gain = compared(call, on)
        if problem:
            return row | {"outcome": WRONG, "detail": problem}
        return row | {"outcome": OK, "detail": "", "gain": round(gain, 3), "served": served(call)}


def main(arguments: list[str]) -> int:
    """Print and keep a row for each backend; 1 where one is not fine, or where all are missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks early-launches", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="without: the GPU where there is one")
    parser.add_argument("--rows", type=Path, help="append each row to this file of JSON lines")
    options = parser.parse_args(arguments)
    if options.device:
        machine.use_device(options.device)
    rows = []
    for backend in BACKENDS:
        try:
            row = in_child(compare, backend, seconds=SECONDS)
        except RuntimeError as error:
            row = {"name": f"early launches by {backend}", "outcome": FAILED, "detail": str(error)}
        rows.append(row)
        if options.rows:
            results.append(options.rows, "early_launches", row)
        print(*(f"{name}: {value}" for name, value in row.items()), sep=", ", flush=True)
    found = [row for row in rows if row["outcome"] != MISSING]
    if not found:
        return 1
    bad = [f"{row['outcome']}: {row['detail']}, {row['name']}" for row in found if row["outcome"] not in FINE]
    print(note(machine.device(), "; ".join(bad), min(row.get("gain", 0.0) for row in found)))
    return int(bool(bad))
