"""The machine that a benchmark runs on: the head of every results file, its clocks and power, and its peak."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ldmq_kernels.kernels.devices import device_called

COMMIT_FILE = Path(__file__).parents[2] / "build" / "wheels" / "commit.txt"  # of a copy without git: `make wheels`

_chosen: list[str] = []  # by `use_device`


def device() -> torch.device:
    """What is measured: the GPU where there is one, or the CPU, unless `use_device` chose."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(_chosen[-1] if _chosen else best)


def use_device(name: str) -> None:
    """Measure the "cpu" or the "cuda" device from here on, in this process.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here that torch can use; --device cpu measures this processor")
    _chosen.append(name)


def dtype() -> torch.dtype:
    """The dtype that models use on the device."""
    return torch.float16 if device().type == "cuda" else torch.bfloat16


def synchronize() -> None:
    """Wait for the GPU where one is measured."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    known = [flag for flag in ("avx2", "avx512_vnni", "amx_int8") if flag in flags]
    return f"{names[0] if names else platform.machine()} ({', '.join(known) or 'no int8 instructions'})"


def machine() -> dict[str, Any]:
    """Device, driver, versions, commit and date: the head of a results file."""
    record: dict[str, Any] = {"device": _cpu_name(), "driver": None}
    if device().type == "cuda":
        record |= {"device": torch.cuda.get_device_name(), "driver": query("driver_version")[0]}
    return record | {
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "threads": torch.get_num_threads(),
        "commit": _output("git", "rev-parse", "HEAD") or _noted_commit(),
        "date": datetime.date.today().isoformat(),
    }


def _noted_commit() -> str | None:
    return COMMIT_FILE.read_text().strip() if COMMIT_FILE.exists() else None


def query(*fields: str) -> list[str | None]:
    """Values of nvidia-smi for the current GPU, None where it has none."""
    found = _output(
        "nvidia-smi",
        f"--id={torch.cuda.current_device()}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
    )
    return [value.strip() or None for value in found.split(",")] if found else [None] * len(fields)


def int8_peak() -> float | None:
    """Dense int8 operations of this GPU, 10^12 a second; None where it is not known."""
    if device().type != "cuda":
        return None
    known = device_called(torch.cuda.get_device_name())
    here = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    # "RTX 3090" is in the name of the RTX 3090 Ti too, which has others
    return None if known is None or known.multiprocessors != here else known.int8_tops
