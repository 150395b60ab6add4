"""What every benchmark shares: the record of the machine, interleaved medians, and the results file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmq_kernels.kernels import dispatch

RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results")


def device() -> torch.device:
    """The GPU where there is one, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    record: dict[str, Any] = {"device": _cpu_name(), "driver": None, "clocks_mhz": None, "power_w": None}
    if torch.cuda.is_available():
        record["device"] = torch.cuda.get_device_name()
        query = "driver_version,clocks.sm,power.draw"
        values = (_output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits") or ",,").split(",")
        record |= dict(
            zip(("driver", "clocks_mhz", "power_w"), (value.strip() or None for value in values), strict=False)
        )
    return record | {
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


def interleaved_ms(variants: dict[str, Callable[[], Any]], rounds: int = 9) -> dict[str, float]:
    """Median milliseconds of each variant, one call of each in turn, after one call to warm up.

    Turns share whatever else the machine does, so ratios hold where absolute times are noisy.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            times[name].append(_one_call_ms(call))
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize() -> None:
    """Wait for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _one_call_ms(call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


Variants = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """One shape of one op: `make` gives "ldmq" and the rivals as calls, over operands that they share.

    work: billions of operations (2 for a multiply and add) of a product, or 0.
    moved: bytes that have to be read and written, or 0.
    """

    op: str
    shape: dict[str, int]
    count: int
    rivals: tuple[str, ...]
    make: Callable[[], Variants]
    work: float = 0.0
    moved: int = 0

    def __str__(self) -> str:
        return "-".join(f"{key}{value}" for key, value in self.shape.items())


def backend() -> str:
    """The backend that serves this machine's best device first."""
    visible = dispatch.visible_backends()
    return next(name for name in dispatch.PREFERENCE[device().type] if visible[name])


def row(case: Case, ms: dict[str, float]) -> dict[str, Any]:
    """One row of a results file; a ratio above 1 means that ours is faster."""
    ours = ms["ldmq"]
    rivals = {name: {"ms": value, "ratio": value / ours} for name, value in ms.items() if name != "ldmq"}
    speed = {"tops": case.work / ours} if case.work else {"gbps": case.moved / ours / 1e6}
    return {
        "op": case.op,
        "shape": case.shape,
        "count": case.count,
        "backend": backend(),
        "ms": ours,
        **speed,
        "rivals": rivals,
    }


def measure(cases: Iterable[Case], rounds: int = 9) -> Iterator[dict[str, Any]]:
    """A row for each case as soon as it is measured, its variants interleaved."""
    for case in cases:
        with torch.inference_mode():
            measured = interleaved_ms(case.make(), rounds)
        yield row(case, measured)


def geometric_mean(rows: list[dict[str, Any]], rival: str) -> float | None:
    """Mean ratio to a rival, weighted by how often a model calls the shape; None where it did not run."""
    pairs = [(r["count"], r["rivals"][rival]["ratio"]) for r in rows if rival in r["rivals"]]
    calls = sum(count for count, _ in pairs)
    return math.exp(sum(count * math.log(ratio) for count, ratio in pairs) / calls) if pairs else None


def benchmark_test(cases: Callable[[], Iterable[Case]]) -> Callable[..., None]:
    """A pytest-benchmark test of every variant of every case, grouped by shape."""

    pairs = [(case, name) for case in cases() for name in ("ldmq", *case.rivals)]

    @pytest.mark.parametrize(("case", "variant"), pairs, ids=lambda value: str(value))
    def test(benchmark: Any, case: Case, variant: str) -> None:
        benchmark.group = f"{case.op} {case}"
        call = case.make()[variant]
        with torch.inference_mode():
            benchmark(lambda: (call(), synchronize()))

    return test


def write_results(what: str, rows: list[dict[str, Any]], summary: dict[str, float | None]) -> Path:
    """Write results/<device>/<date>-<what>.json; None is left out of the summary."""
    record = machine()
    folder = RESULTS / "".join(c if c.isalnum() else "-" for c in record["device"].split("(")[0].strip()).lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['date']}-{what}.json"
    kept = {key: value for key, value in summary.items() if value is not None}
    path.write_text(json.dumps({**record, "rows": rows, "summary": kept}, indent=1) + "\n")
    return path
