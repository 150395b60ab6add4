"""What this very GPU can do at most: matrix products in fp16, FP8 and int8, and a copy.

Run: python -m benchmarks.ceilings
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, rows
from benchmarks.machine import device, gpu_state

SIZES = (4096, 8192) if torch.cuda.is_available() else (256,)
COPIED = 2**30 if torch.cuda.is_available() else 2**20


def _products(size: int) -> common.Variants:
    on = device()
    half = torch.randn(size, size, device=on).to(torch.float16 if on.type == "cuda" else torch.bfloat16)
    whole = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=on)
    found: common.Variants = {"fp16": lambda: half @ half.t(), "int_mm": lambda: torch._int_mm(whole, whole.t())}
    if on.type == "cuda":
        narrow, one = half.to(torch.float8_e4m3fn), torch.ones((), device=on)
        found["fp8"] = lambda: torch._scaled_mm(
            narrow, narrow.t(), one, one, out_dtype=torch.float16, use_fast_accum=True
        )
    return found


def measure(rounds: int = 15) -> Iterator[dict[str, Any]]:
    """A row for each size of product, and one for a copy of a gigabyte."""
    for size in SIZES:
        kept, notes = common.working({"ldmq": lambda: None, **_products(size)})
        del kept["ldmq"]
        ms = common.interleaved_ms(kept, rounds)
        tops = {name: 2e-9 * size**3 / value for name, value in ms.items()}
        yield {"name": f"{size}^3", "tops": tops, "ms": ms, "notes": notes} | gpu_state()
    source = torch.zeros(COPIED, dtype=torch.int8, device=device())
    ms = common.interleaved_ms({"copy": source.clone}, rounds)
    yield {"name": "copy", "gbps": 2 * COPIED / ms["copy"] / 1e6, "ms": ms} | gpu_state()


def main() -> None:
    """Print each row, and write or append them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    found = []
    for row in measure():
        print(row, flush=True)
        found.append(row)
        if options.rows:
            rows.append(options.rows, "ceilings", row)
    if not options.rows:
        print(common.write_results("ceilings", found, {}))


if __name__ == "__main__":
    main()
