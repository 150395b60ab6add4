"""Seconds from an empty Triton cache to the first output of an SD 1.5 UNet in W8A8: python -m benchmarks.cold_start

Needs a GPU; `benchmarks.compilations` counts and compiles the same kernels without one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common, rows


def first_call() -> float:
    """Seconds of the first call in this process, its model being there already."""
    import torch

    from benchmarks.machine import device
    from benchmarks.model_gpu import materialize, quantized
    from benchmarks.models import MODELS

    with torch.device("meta"):
        empty = MODELS["sd15"].make()
    model = quantized(materialize(empty, torch.float16, device()))
    inputs = MODELS["sd15"].inputs(device(), torch.float16)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with torch.no_grad():
        model(**inputs)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    """Measure in a process with an empty cache and again in one with the cache that it left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--here", action="store_true", help="in this process: print the seconds, and stop")
    options = parser.parse_args()
    if options.here:
        print(first_call())
        return
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.cold_start", "--here"]
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        cold, warm = (
            float(
                subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1]
            )
            for _ in range(2)
        )
    summary = {"cold_start/seconds_to_first_call": cold}
    row = {"name": "cold start", "seconds": {"cold": cold, "warm": warm}, "summary": summary}
    print(row)
    if options.rows:
        rows.append(options.rows, "cold_start", row)
    else:
        print(common.write_results("cold_start", [row], summary))


if __name__ == "__main__":
    main()
