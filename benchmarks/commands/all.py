"""The machine, every op and the models of this device, recorded in benchmarks/results: python -m benchmarks all

Each is measured in a process of its own, so that one that fails stops no other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch

from benchmarks.harness import results


def commands(device: str) -> list[tuple[str, ...]]:
    """What is measured on a device, as arguments of `python -m benchmarks`."""
    models = ("sd15", "sdxl", "vae_decoder") if device == "cuda" else ("sd15",)
    found = [("machine",), *(("op", op) for op in results.OPS), *(("model", name) for name in models)]
    return [(*command, "--device", device) for command in found]


def main(arguments: list[str]) -> int:
    """Run all; 1 where any failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks all", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    failed = []
    for command in commands(parser.parse_args(arguments).device):
        print(f"\n== {' '.join(command)}", flush=True)
        if subprocess.run([sys.executable, "-m", "benchmarks", *command, "--record"]).returncode:
            failed.append(" ".join(command))
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(failed))
