"""Everything that a GPU session should bring home, in order of value, within a time limit.

Run: python benchmarks/on_gpu.py --seconds 500. Results go below $OUT where it is set, or beside this
file. Each stage is a process of its own, cut short when time is up; what came before it is kept.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPS = (
    "linear_w8a8",
    "conv2d_w8a8",
    "quantize_per_token",
    "quantize_per_sample",
    "quantize_static",
    "linear_w4a8",
    "conv2d_w4a8",
    "linear_w8a16",
    "conv2d_w8a16",
    "linear_w4a16",
)
TESTS = ("-m", "pytest", "-q", "-x", "--no-header", "python_tests/gpu")
STAGES = [("tests", TESTS), *((op, ("-m", "benchmarks.measure_op", op)) for op in OPS)]
LARGEST_SHARE = 0.4  # of the whole time, for one stage
SMALLEST_STAGE = 5.0  # seconds; less than this only starts Python


def _run(command: tuple[str, ...], seconds: float, log: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        try:
            run = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return "cut short"
    return "passed" if run.returncode == 0 else f"failed ({run.returncode})"


def main() -> int:
    """Run the stages and print one line for each; 1 where any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, required=True)
    seconds = parser.parse_args().seconds
    deadline = time.monotonic() + seconds
    logs = Path(os.environ.get("OUT") or Path(__file__).parent / "results") / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    failed = False
    for name, command in STAGES:
        left = deadline - time.monotonic()
        if left < SMALLEST_STAGE:
            print(f"{name}: not started, no time left")
            continue
        begin, log = time.monotonic(), logs / f"{name}.log"
        outcome = _run(command, min(left, seconds * LARGEST_SHARE), log)
        failed |= outcome.startswith("failed")
        print(f"{name}: {outcome} in {time.monotonic() - begin:.0f} s", flush=True)
        if outcome.startswith("failed"):
            print(log.read_text(errors="replace")[-2000:], flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
