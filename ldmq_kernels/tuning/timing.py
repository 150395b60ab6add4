"""Time of one call on a GPU as a model would see it: caches cold, launches ahead of the work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

FLUSHED_BYTES = 256 * 2**20  # written between calls: five times the largest L2 cache
HEAD_START = 1_000_000  # clocks that the GPU waits before a timed call, so that the host's launches come before


def one_call_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call: of the GPU alone, with the L2 cache flushed before, or of the host on a CPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device).zero_()
    torch.cuda._sleep(HEAD_START)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
