"""The backends at a call: the fastest tile of each that has a choice, and who is faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ldmq_kernels.kernels import dispatch, measurements
from ldmq_kernels.kernels.backend import Backend, backends, usual_order
from ldmq_kernels.kernels.op_spec import spec_of
from ldmq_kernels.timing import Clock, interleaved
from ldmq_kernels.tuning.calls import Call
from ldmq_kernels.tuning.fastest import Candidates, Run, fastest, launchable
from ldmq_kernels.tuning.shapes import Input

_SHOWN_DIGITS = 4


def compared_backends(op: str, device: torch.device) -> list[Backend]:
    """The backends that are measured against each other for an op, the usual one first; none that is switched off."""
    found = [
        backend
        for backend in backends().values()
        if backend.is_raced
        and backend.serves(device)
        and backend.has(op)
        and measurements.switched_off(op, backend.name, device) is None
    ]
    usual = usual_order(device)

    def place(backend: Backend) -> tuple[int, bool, int]:
        at = usual.index(backend.name) if backend.name in usual else len(usual)
        return at, backend.rank is None, -(backend.rank or 0)

    return sorted(found, key=place)


def mark(backend: Backend, text: str) -> str:
    """How the file names a backend's share of something."""
    return f"{backend.name} {text}" if backend.tiles is None else backend.tiles.mark(text)


def measure_tiles(
    call: Call, run: Run, backend: Backend, device: torch.device, timer: Clock, found: dict[str, Any], expected: Any
) -> dict[str, Any] | None:
    """Add the fastest tile of each product that a call makes on a backend to `found`.

    Args:
        call: what is measured.
        run: the call with its operands.
        backend: which.
        device: where.
        timer: milliseconds of a call on a device.
        found: the content of the file of measurements.
        expected: the right result, by which a tile that is wrong is refused; None where the backend's own holds.

    Returns:
        The fastest tile by product; None where no tile of a product launches and is right.

    Raises:
        TuningError: a tile left the device unusable.
    """
    tiles = backend.tiles
    if tiles is None or not tiles.has(call.op) or isinstance(call.shape, Input):
        return {}
    agreement = spec_of(call.op).agreement
    lines, best = found.setdefault(tiles.section, {}), {}
    with dispatch.use_backend(backend.name):
        for key in tiles.asked_by(call.op, call.shape.product, run):
            known = tiles.read(key, lines[key], device) if key in lines else None
            if known is None:
                candidates = Candidates(tiles.mark(key), tiles.candidates(key, device), tiles.forced, tiles.written)
                check = _right if expected is None else partial(agreement.difference, expected=expected)
                times = fastest(run, candidates, device, timer, found["refused"], check)
                if not times:
                    return None
                known, first = min(times, key=lambda tile: times[tile]), next(iter(times))
                lines[key] = tiles.written(known)
                found["milliseconds"][tiles.mark(key)] = [times[known], times[first]]
            best[key] = known
    return best


def _right(_result: Any) -> str:
    return ""


@contextlib.contextmanager
def _served_by(backend: Backend, best: dict[str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch.use_backend(backend.name))
        if backend.tiles is not None:
            stack.enter_context(backend.tiles.taking(best))
        yield


def compare_backends(
    call: Call, arguments: tuple[Any, ...], run: Run, device: torch.device, timer: Clock, found: dict[str, Any]
) -> None:
    """Add the fastest tiles of every backend, and which of them is faster, to `found`.

    The usual backend's result is what the others must agree with; one that does not take the call is left out.

    Args:
        call: what is measured.
        arguments: its operands.
        run: the call with them.
        device: where.
        timer: milliseconds of a call on a device.
        found: the content of the file of measurements.

    Raises:
        TuningError: a tile left the device unusable.
    """
    entrants = compared_backends(call.op, device)
    spec, served, expected = spec_of(call.op), {}, None
    for backend in entrants:
        best = measure_tiles(call, run, backend, device, timer, found, expected)
        if best is None and expected is not None:
            continue
        context = partial(_served_by, backend, best or {})
        if expected is None:
            if len(entrants) == 1:
                return
            with context():
                expected = run()
            served[backend.name] = context
            continue
        whole = Candidates(mark(backend, f"{call.op} {call.shape}"), [context], lambda own: own(), lambda _: None)
        if launchable(run, whole, device, found["refused"], partial(spec.agreement.difference, expected=expected)):
            served[backend.name] = context
    if len(served) < 2:
        return
    samples = interleaved(dict.fromkeys(served, run), device, warm_up=0, clock=timer, contexts=served)
    medians = {name: round(taken.median, _SHOWN_DIGITS) for name, taken in samples.items()}
    line = {"backend": min(samples, key=lambda name: samples[name].median), "milliseconds": medians}
    found["backends"].setdefault(call.op, {})[spec.shape_text(arguments)] = line
