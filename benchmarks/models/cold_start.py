"""Seconds from an empty Triton cache to the first output of an SD 1.5 UNet in W8A8: python -m benchmarks cold-start

Needs a GPU; `python -m benchmarks compilations` counts and compiles the same kernels without one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

from benchmarks.harness import results
from benchmarks.harness.machine import device
from benchmarks.harness.tables import markdown
from benchmarks.models.definitions import MODELS
from benchmarks.models.gpu import materialize, quantized

FIRST_CALL = "from benchmarks.models.cold_start import first_call; print(first_call())"


def first_call() -> float:
    """Seconds of the first call in this process, its model being there already."""
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


def seconds(cache: str) -> float:
    """Seconds of the first call in a new process with a Triton cache."""
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    command = [sys.executable, "-c", FIRST_CALL]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def table(data: dict[str, Any]) -> str:
    """Seconds with an empty and with a full cache, for the pages."""
    lines = [[name, f"{value:.1f}"] for name, value in data["rows"][0]["seconds"].items()]
    return "**First call of an SD 1.5 UNet**\n\n" + markdown(["Triton cache", "seconds"], lines)


def main(arguments: list[str]) -> None:
    """Measure in a process with an empty cache and again in one with the cache that it left."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cold-start", description=__doc__)
    results.add_options(parser)
    options = parser.parse_args(arguments)
    if device().type != "cuda":
        parser.error("a cold start is measured on a GPU; `python -m benchmarks compilations` needs none")
    output = results.Output.of("cold_start", options)
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = seconds(cache), seconds(cache)
    summary = {"cold_start/seconds_to_first_call": cold}
    row = {"name": "cold start", "seconds": {"cold": cold, "warm": warm}, "summary": summary}
    output.add(row)
    print(row, *output.files, sep="\n")
