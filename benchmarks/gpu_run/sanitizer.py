"""Whether compute-sanitizer finds anything in the CUDA kernels: python -m benchmarks sanitizer --rows ROWS.jsonl

memcheck and synccheck run beside each other over every tile on a small call, a row each whatever happens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import results

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "synccheck")
FOUND = 9
WATCHED = ("-m", "python_tests.gpu.small_calls", "--tiles")


def sanitizer() -> str | None:
    """compute-sanitizer of PATH, or of the place where CUDA installs itself."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), f"{home}/bin"]))


def check(tools: tuple[str, ...], seconds: float) -> list[dict[str, Any]]:
    """A row for each tool: "ok", "found", "failed", "missing" or "cut short", with the end of what it says."""
    command = sanitizer()
    if command is None:
        return [{"name": tool, "outcome": "missing", "detail": "compute-sanitizer is not installed"} for tool in tools]
    deadline, environment = time.monotonic() + seconds, os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    processes = {}
    for tool in tools:
        options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5", sys.executable, *WATCHED]
        processes[tool] = subprocess.Popen(
            [command, *options],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    rows = []
    for tool, process in processes.items():
        try:
            text, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            outcome = {0: "ok", FOUND: "found"}.get(process.returncode, f"failed ({process.returncode})")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, outcome = process.communicate()[0], "cut short"
        rows.append({"name": tool, "outcome": outcome, "detail": text[-1000:]})
    return rows


def main(arguments: list[str]) -> int:
    """Print and keep the rows; 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sanitizer", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rows", type=Path, help="append each row to this file of JSON lines")
    options = parser.parse_args(arguments)
    rows = check(TOOLS, options.seconds)
    for row in rows:
        if options.rows:
            results.append(options.rows, "sanitizer", row)
        print(f"{row['name']}: {row['outcome']}\n{row['detail']}")
    return int(any(row["outcome"] not in ("ok", "missing", "cut short") for row in rows))
