"""The one timer: callables in turns, so that whatever else the machine does falls on all of them alike.

A clock gives the milliseconds of one call on a device. `one_call_ms` is the usual one for kernels and layers;
`warm_ms` and `cold_ms` say what the caches hold, and `wall_ms` is what a person waits for, launches included.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")
Call = Callable[[], Any]
Clock = Callable[[Call, torch.device], float]
Context = Callable[[], AbstractContextManager[Any]]

ROUNDS = 9
WARM_UP = 1
FLUSHED_BYTES = 256 * 2**20  # written before a cold call: five times the largest L2 cache of a GPU
HEAD_START = 1_000_000  # clocks that a GPU waits before a timed call, so that the host's launches come before
SAMPLE_MS = 2.0  # a shorter call on a CPU is repeated until this much time has passed


@dataclass(frozen=True)
class Samples:
    """The milliseconds that one callable took, a value for each round.

    Attributes:
        milliseconds: in the order in which they were taken.
    """

    milliseconds: tuple[float, ...]

    def percentile(self, share: float) -> float:
        """The milliseconds below which a share in [0, 1] of the rounds lies, interpolated between neighbours."""
        ordered = sorted(self.milliseconds)
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    @property
    def p20(self) -> float:
        """The milliseconds of the fast rounds: a fifth were faster."""
        return self.percentile(0.2)

    @property
    def median(self) -> float:
        """The milliseconds that half of the rounds stayed below."""
        return self.percentile(0.5)

    @property
    def p80(self) -> float:
        """The milliseconds of the slow rounds: a fifth were slower."""
        return self.percentile(0.8)

    @property
    def least(self) -> float:
        """The milliseconds of the fastest round."""
        return min(self.milliseconds)

    @property
    def noise(self) -> float:
        """Half the distance between p20 and p80 as a share of the median: 0.02 reads as a median within 2 %."""
        return (self.p80 - self.p20) / 2 / self.median if self.median > 0 else 0.0


def interleaved(
    calls: Mapping[Name, Call],
    device: torch.device,
    *,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
    clock: Clock | None = None,
    contexts: Mapping[Name, Context] | None = None,
) -> dict[Name, Samples]:
    """Time several callables in turns: each once a round, each round beginning with the next of them.

    Args:
        calls: what is timed, by a name.
        device: where their work is done.
        rounds: samples of each callable.
        warm_up: rounds before, which are not counted.
        clock: the milliseconds of a call on a device; `one_call_ms` by default.
        contexts: by name, what is entered before a call and left after it, outside the time.

    Returns:
        The samples by name, in the order of `calls`.
    """
    clock = clock or one_call_ms
    names, taken = list(calls), {name: list[float]() for name in calls}
    for turn in range(warm_up + rounds):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            with (contexts or {}).get(name, contextlib.nullcontext)():
                milliseconds = clock(calls[name], device)
            if turn >= warm_up:
                taken[name].append(milliseconds)
    return {name: Samples(tuple(samples)) for name, samples in taken.items()}


def one_call_ms(call: Call, device: torch.device) -> float:
    """Milliseconds of a call as a model sees it: on a GPU with cold caches (`cold_ms`), on a CPU as `warm_ms`."""
    return cold_ms(call, device) if device.type == "cuda" else warm_ms(call, device)


def cold_ms(call: Call, device: torch.device, now: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of a call whose operands are in no cache: `FLUSHED_BYTES` are written before it.

    Args:
        call: what is timed, once.
        device: on a GPU its work alone counts, by CUDA events, its launches coming before; on a CPU the call.
        now: the seconds of a CPU's clock.
    """
    torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device).zero_()
    return _gpu_ms(call) if device.type == "cuda" else _repeated_ms(call, 1, now)


def warm_ms(call: Call, device: torch.device, now: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of a call right after the same call.

    Args:
        call: what is timed: on a GPU once, on a CPU as often as fits into `SAMPLE_MS`, and their mean counts.
        device: on a GPU its work alone counts, by CUDA events, its launches coming before.
        now: the seconds of a CPU's clock.
    """
    if device.type == "cuda":
        call()
        return _gpu_ms(call)
    first = _repeated_ms(call, 1, now)
    if first >= SAMPLE_MS:
        return first
    return _repeated_ms(call, math.ceil(SAMPLE_MS / max(first, SAMPLE_MS / 10_000)), now)


def wall_ms(call: Call, device: torch.device, now: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds until the result of one call is there, the launches of a GPU's kernels included."""
    _synchronize(device)
    begin = now()
    call()
    _synchronize(device)
    return (now() - begin) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _repeated_ms(call: Call, repeats: int, now: Callable[[], float]) -> float:
    begin = now()
    for _ in range(repeats):
        call()
    return (now() - begin) * 1e3 / repeats


def _gpu_ms(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
