"""Clock and power of the GPU while something is timed, read by a thread beside it.

A GPU that is busy for seconds lowers its clock to keep within its power: a figure is that of these clocks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import threading
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from benchmarks.harness.machine import device

EVERY = 0.02  # seconds
Reader = Callable[[], tuple[float, float]]  # MHz of the multiprocessors, and watts


@contextlib.contextmanager
def sampled(read: Reader | None = None) -> Iterator[dict[str, Any]]:
    """Fill a dict with what was read inside of the block, at its end; it stays empty on a CPU.

    Args:
        read: gives the two figures now; the current GPU's by default.

    Returns:
        "clocks_mhz" and "power_w", each with "median", "least", "most" and the number of "samples".
    """
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as opened:
        if read is None and device().type == "cuda":
            with contextlib.suppress(Exception):  # a figure that cannot be read is no reason to lose the others
                read = opened.enter_context(_by_nvml() if importlib.util.find_spec("pynvml") else _by_nvidia_smi())
        if read is None:
            yield found
            return
        samples: list[tuple[float, float]] = []
        stop = threading.Event()

        def follow() -> None:
            with contextlib.suppress(Exception):
                while not stop.wait(EVERY):
                    samples.append(read())

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            stop.set()
            thread.join(5)
            for name, values in zip(("clocks_mhz", "power_w"), zip(*list(samples), strict=True), strict=False):
                figures = {"median": median(values), "least": min(values), "most": max(values)}
                found[name] = figures | {"samples": len(values)}


@contextlib.contextmanager
def _by_nvml() -> Iterator[Reader]:
    import pynvml

    pynvml.nvmlInit()
    try:
        # by the bus, since CUDA_VISIBLE_DEVICES numbers GPUs anew
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}".encode())
        yield lambda: (
            float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        )
    finally:
        pynvml.nvmlShutdown()


@contextlib.contextmanager
def _by_nvidia_smi() -> Iterator[Reader]:
    """One process that prints a line every so often, since each start of it costs more than a timed region."""
    command = ["nvidia-smi", f"--id={torch.cuda.current_device()}", "--query-gpu=clocks.sm,power.draw"]
    command += ["--format=csv,noheader,nounits", f"--loop-ms={EVERY * 1e3:.0f}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = process.stdout
        assert lines is not None

        def read() -> tuple[float, float]:
            clock, power = lines.readline().split(",")
            return float(clock), float(power)

        try:
            yield read
        finally:
            process.kill()
