"""Measure one op on this machine and write its results file: python -m benchmarks.measure_op linear_w8a8"""

from __future__ import annotations

import argparse
import importlib

import torch

from benchmarks import common


def main() -> None:
    """Print a line for each shape, then where the results are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = importlib.import_module(f"benchmarks.bench_{options.op}")
    rows = []
    for row in common.measure(module.cases(), options.rounds):
        rows.append(row)
        ratios = "  ".join(f"{name} x{rival['ratio']:.2f}" for name, rival in row["rivals"].items())
        print(f"{row['op']} {row['shape']}: {row['ms']:.3f} ms  {ratios}", flush=True)
        summary = module.summary(rows) if hasattr(module, "summary") else {}
        path = common.write_results(options.op, rows, summary)  # after each row: a run may be cut short
    print(path)


if __name__ == "__main__":
    main()
