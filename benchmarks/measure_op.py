"""Measure one op on this machine: python -m benchmarks.measure_op linear_w8a8 [--rows FILE]

Writes a results file or, with --rows, appends each shape's row to FILE as soon as it is measured.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from benchmarks import common, rows


def main() -> None:
    """Print a line for each shape, then where the results are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = importlib.import_module(f"benchmarks.bench_{options.op}")
    found = []
    for row in common.measure(module.cases(), options.rounds):
        found.append(row)
        ratios = "  ".join(f"{name} x{rival['ratio']:.2f}" for name, rival in row["rivals"].items())
        print(f"{row['op']} {row['shape']}: {row['ms']:.3f} ms  {ratios}", flush=True)
        if options.rows:
            rows.append(options.rows, options.op, row)
        else:
            summary = module.summary(found) if hasattr(module, "summary") else {}
            path = common.write_results(options.op, found, summary)  # after each row: a run may be cut short
    print(options.rows or path)


if __name__ == "__main__":
    main()
