"""What this very device can do at most: GEMMs in 16 bit, FP8 and int8, and a copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness.baselines import BASELINES
from benchmarks.harness.cases import working
from benchmarks.harness.clocks import sampled
from benchmarks.harness.machine import device, dtype
from benchmarks.harness.tables import markdown
from benchmarks.harness.timing import Variants, medians

SIZES = {"cuda": (4096, 8192), "cpu": (256,)}
COPIED = {"cuda": 2**30, "cpu": 2**20}  # bytes


def _gemms(size: int) -> Variants:
    on = device()
    half = torch.randn(size, size, device=on).to(dtype())
    whole = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=on)
    name = "fp16" if on.type == "cuda" else "bf16"
    found: Variants = {name: lambda: half @ half.t(), "int_mm": lambda: torch._int_mm(whole, whole.t())}
    if BASELINES["fp8"].missing() is None:
        narrow, one = half.to(torch.float8_e4m3fn), torch.ones((), device=on)
        found["fp8"] = lambda: torch._scaled_mm(
            narrow, narrow.t(), one, one, out_dtype=torch.float16, use_fast_accum=True
        )
    return found


def measure(rounds: int = 15) -> Iterator[dict[str, Any]]:
    """A row for each size of GEMM, and one for a copy."""
    for size in SIZES[device().type]:
        kept, notes = working(_gemms(size), ())
        with sampled() as state:
            ms = medians(kept, rounds)
        tops = {name: 2e-9 * size**3 / value for name, value in ms.items()}
        yield {"name": f"{size}^3", "tops": tops, "ms": ms, "notes": notes} | state
    copied = COPIED[device().type]
    source = torch.zeros(copied, dtype=torch.int8, device=device())
    with sampled() as state:
        ms = medians({"copy": source.clone}, rounds)
    yield {"name": "copy", "gbps": 2 * copied / ms["copy"] / 1e6, "ms": ms} | state


def table(data: dict[str, Any]) -> str:
    """All rows, for the pages."""
    lines = [
        [row["name"], ", ".join(f"{name} {value:.0f}" for name, value in row["tops"].items()), "10^12 a second"]
        if "tops" in row
        else [row["name"], f"{row['gbps']:.0f}", "GB/s"]
        for row in data["rows"]
    ]
    return "**What the device can do**\n\n" + markdown(["", "", ""], lines)


def text(row: dict[str, Any]) -> str:
    """A row as a line for a terminal."""
    if "gbps" in row:
        return f"{row['name']:10} {row['gbps']:.1f} GB/s"
    notes = [f"{name} is left out: {why}" for name, why in row["notes"].items()]
    rates = "  ".join(f"{name} {value:.2f} TOPS" for name, value in row["tops"].items())
    return "\n".join([f"{row['name']:10} {rates}", *notes])
