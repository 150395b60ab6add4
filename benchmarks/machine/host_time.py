"""Microseconds that the host spends on a call of each op, the GPU's work left out.

On a GPU the calls are queued behind a long wait, so that none of them waits for the device; on a CPU the ops
compute as well, on one token or pixel, and the figure is an upper bound of the dispatch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness.machine import device
from benchmarks.harness.tables import markdown
from ldmq_kernels import ops
from ldmq_kernels.cli.checks import SHAPES
from ldmq_kernels.ops.operands import example

CALLS = 100
WAIT = 100_000_000  # clocks


def microseconds(op: str) -> float:
    """The host's time of one call on small operands."""
    on = device()
    arguments = example(op, SHAPES[0], on, torch.float16 if on.type == "cuda" else torch.float32)
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


def measure() -> Iterator[dict[str, Any]]:
    """One row: each op's microseconds."""
    found = {op: microseconds(op) for op in ops.specs()}
    yield {"name": "host time", "us": found, "summary": {"host/us_per_op": sum(found.values()) / len(found)}}


def table(data: dict[str, Any]) -> str:
    """Each op's microseconds, for the pages."""
    lines = [[op, f"{value:.0f}"] for op, value in data["rows"][0]["us"].items()]
    return "**Host time of a call on small operands**\n\n" + markdown(["op", "us"], lines)


def text(row: dict[str, Any]) -> str:
    """A row as lines for a terminal."""
    return "\n".join(f"{op:26} {value:8.1f} us" for op, value in row["us"].items())
