"""Measures the most promising tiles of every op and shape on this GPU, and keeps the fastest in a file.

Where several backends serve, they are measured at the same calls, and which of them is faster is kept, too (see
`kernels.measurements`). The file is written after every shape, so a run that is cut short loses nothing, and the next
one goes on with what is not in it yet. No op measures anything when it runs; it reads this file.
"""

from __future__ import annotations

import datetime
import json
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldmq_kernels import ops
from ldmq_kernels.files import check_place, read_json, shortened, write_whole
from ldmq_kernels.kernels import measurements
from ldmq_kernels.kernels.backend import Backend, backends
from ldmq_kernels.kernels.gpu import gpu_of
from ldmq_kernels.progress import track
from ldmq_kernels.timing import Clock, one_call_ms
from ldmq_kernels.tuning.calls import Call, calls
from ldmq_kernels.tuning.compare_backends import compare_backends, compared_backends, mark
from ldmq_kernels.tuning.fastest import TuningError
from ldmq_kernels.tuning.shapes import Input

MODELS = ("sd15", "sdxl", "vae_decoder")
_EMPTY = {"tiles": dict, "milliseconds": dict, "backends": dict, "refused": dict, "seen": list}


def tune(
    device: torch.device,
    out: Path | None = None,
    *,
    seconds: float | None = None,
    names: tuple[str, ...] | None = None,
    models: tuple[str, ...] = MODELS,
    timer: Clock = one_call_ms,
    show: bool = True,
) -> tuple[Path, int]:
    """Measure, and write the fastest tiles and backends for this kind of GPU.

    A backend that `ldmq doctor` switched off for an op is left out there, with a warning.

    Args:
        device: a GPU that a backend with kernels to measure serves.
        out: the file; by default this user's, which the ops read.
        seconds: stop after so many, with what has been measured until then.
        names: of ops; all of them by default.
        models: whose shapes, of "sd15", "sdxl" and "vae_decoder".
        timer: milliseconds of a call on a device.
        show: a progress bar.

    Returns:
        The file's path, and how many shapes are left for another run.

    Raises:
        TuningError: there is no such GPU, or the file is damaged or was measured on another one.
        OSError: the file cannot be written.
    """
    names = tuple(ops.specs()) if names is None else names
    served = [backend for backend in backends().values() if backend.is_raced and backend.serves(device)]
    if not served:
        raced = [backend for backend in backends().values() if backend.is_raced]
        reasons = "; ".join(f"{backend.name} {backend.why_not(device)}" for backend in raced)
        raise TuningError(f"{device} is served by no backend whose kernels are measured: {reasons}")
    path = out or measurements.user_file(device)
    check_place(path)
    found = _earlier(path, device, served)
    begin = time.monotonic()
    _warn_of_what_is_off(names, served, device)
    todo = _todo(names, models, device, found["seen"])
    for call, parts in track(todo, "shapes", len(todo), show=show):
        if seconds is not None and time.monotonic() - begin > seconds:
            break
        try:
            _measure(call, parts, device, timer, found)
        finally:
            _write(path, found)
    measurements.forget()
    seen = set(found["seen"])
    return path, sum(not seen.issuperset(parts) for _, parts in todo)


def _warn_of_what_is_off(names: tuple[str, ...], served: list[Backend], device: torch.device) -> None:
    for op in names:
        for backend in served:
            reason = measurements.switched_off(op, backend.name, device)
            if reason is not None:
                warnings.warn(f"{op} is not tuned on {backend.name}: it is switched off, {reason}", stacklevel=3)


def _todo(
    names: tuple[str, ...], models: tuple[str, ...], device: torch.device, seen: list[str]
) -> list[tuple[Call, list[str]]]:
    """Calls, those with the most work first, each with what says in "seen" afterwards that it was measured."""
    todo = []
    entrants = {op: compared_backends(op, device) for op in names}
    for call in sorted(calls(names, models, device), key=lambda call: -call.work):
        # the usual backend has nothing to measure where it has no tiles: the others are measured against it
        has_tiles = [b.tiles is not None and b.tiles.has(call.op) for b in entrants[call.op][:1]]
        measured = entrants[call.op][0 if all(has_tiles) and not isinstance(call.shape, Input) else 1 :]
        parts = [mark(backend, f"{call.op} {call.shape}") for backend in measured]
        parts = [part for part in parts if part not in seen]
        if parts:
            todo.append((call, parts))
    return todo


def _write(path: Path, found: dict[str, Any]) -> None:
    """Write what was measured; what else the file holds, such as what is switched off, stays as it is now."""
    kept = read_json(path) if path.exists() else {}
    head = {**kept, **found, "date": datetime.date.today().isoformat(), "torch": torch.__version__}
    write_whole(path, (json.dumps(head, indent=1) + "\n").encode())


def _earlier(path: Path, device: torch.device, served: list[Backend]) -> dict[str, Any]:
    """What a file holds already; parts that an earlier version did not write are empty."""
    name = gpu_of(device).name
    tiles = [backend.tiles for backend in served if backend.tiles is not None]
    kinds = _EMPTY | {choice.section: dict for choice in tiles}
    empty: dict[str, Any] = {key: kind() for key, kind in kinds.items()}
    if not path.exists():
        return {"gpu": name, **empty}
    try:
        content = read_json(path)
        for choice in tiles:
            content = choice.updated(content)
        if content["gpu"] != name:
            raise TuningError(f"{path} was measured on {content['gpu']}, this is {name}: choose another file")
        found = {key: content.get(key, nothing) for key, nothing in empty.items()}
        for key, kind in kinds.items():
            if not isinstance(found[key], kind):
                raise TypeError(f"{key!r} is {found[key]!r}")
        return {"gpu": name, **found}
    except TuningError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TuningError(f"{path} is damaged ({shortened(error)}): remove it to measure anew") from None


def _measure(call: Call, parts: list[str], device: torch.device, timer: Clock, found: dict[str, Any]) -> None:
    """Add the fastest tile of each product that a call makes, and the fastest backend, to `found`."""
    arguments = call.make()
    with torch.inference_mode():
        compare_backends(call, arguments, partial(getattr(ops, call.op), *arguments), device, timer, found)
    found["seen"] += parts
