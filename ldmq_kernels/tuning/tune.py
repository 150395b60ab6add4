"""Measures the most promising tiles of every op and shape on this GPU, and keeps the fastest in a file.

Where the CUDA backend serves as well, its tiles are measured at the same calls, and which of the two backends is
faster is kept, too (see `kernels.choices`). The file is written after every shape, so a run that is cut short loses
nothing, and the next one goes on with what is not in it yet. No op measures anything when it runs; it reads this file.
"""

from __future__ import annotations

import datetime
import json
import time
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldmq_kernels import ops
from ldmq_kernels.files import write_whole
from ldmq_kernels.kernels import dispatch, measurements
from ldmq_kernels.kernels import triton as triton_backend
from ldmq_kernels.kernels.gpu import gpu_of
from ldmq_kernels.progress import track
from ldmq_kernels.timing import Clock, one_call_ms
from ldmq_kernels.tuning.calls import OPS, PRODUCERS, Call, calls
from ldmq_kernels.tuning.contest import RIVAL, compete, rival_runs
from ldmq_kernels.tuning.fastest import Run, Tiles, TuningError, fastest

MODELS = ("sd15", "sdxl", "vae_decoder")
SHORTLIST = 8  # tiles by estimate, and the persistent forms of the best of them
_EMPTY = {
    "tiles": dict,
    "milliseconds": dict,
    "cuda_tiles": dict,
    "backends": dict,
    "refused": dict,
    "seen": list,
}


def tune(
    device: torch.device,
    out: Path | None = None,
    *,
    seconds: float | None = None,
    names: tuple[str, ...] = OPS + PRODUCERS,
    models: tuple[str, ...] = MODELS,
    timer: Clock = one_call_ms,
    show: bool = True,
) -> tuple[Path, int]:
    """Measure, and write the fastest tiles and backends for this kind of GPU.

    An op whose Triton kernel `ldmq doctor` switched off is left out, with a warning.

    Args:
        device: a GPU that the Triton backend serves.
        out: the file; by default this user's, which the ops read.
        seconds: stop after so many, with what has been measured until then.
        names: ops.
        models: whose shapes, of "sd15", "sdxl" and "vae_decoder".
        timer: milliseconds of a call on a device.
        show: a progress bar.

    Returns:
        The file's path, and how many shapes are left for another run.

    Raises:
        TuningError: there is no such GPU, or the file is damaged or was measured on another one.
    """
    if not triton_backend.serves(device):
        raise TuningError(
            f"tiles are measured on an NVIDIA GPU of compute capability 8.0 or newer, by triton; {device} is not served"
        )
    path = out or measurements.user_file(device)
    found = _earlier(path, gpu_of(device).name)
    begin = time.monotonic()
    todo = _todo(_tunable(names, device), models, device, found["seen"])
    for call, parts in track(todo, "shapes", len(todo), show=show):
        if seconds is not None and time.monotonic() - begin > seconds:
            break
        try:
            _measure(call, parts, device, timer, found)
        finally:
            _write(path, found)
    measurements.forget()
    seen = set(found["seen"])
    return path, sum(not seen.issuperset(parts.values()) for _, parts in todo)


def _tunable(names: tuple[str, ...], device: torch.device) -> tuple[str, ...]:
    off = {op: measurements.switched_off(op, "triton", device) for op in names}
    for op, reason in off.items():
        if reason is not None:
            warnings.warn(f"{op} is not tuned: its Triton kernel is switched off, {reason}", stacklevel=3)
    return tuple(op for op in names if off[op] is None)


def _todo(
    names: tuple[str, ...], models: tuple[str, ...], device: torch.device, seen: list[str]
) -> list[tuple[Call, dict[str, str]]]:
    """Calls, each with the backends that are to be measured and what says so in "seen" afterwards."""
    todo = []
    for call in calls(names, models, device):
        key = f"{call.op} {call.shape}"
        parts = {"triton": key} if call.op in OPS else {}
        if rival_runs(call.op, device):
            parts[RIVAL] = f"{RIVAL} {key}"
        parts = {backend: part for backend, part in parts.items() if part not in seen}
        if parts:
            todo.append((call, parts))
    return todo


def _write(path: Path, found: dict[str, Any]) -> None:
    """Write what was measured; what else the file holds, such as what is switched off, stays as it is now."""
    from ldmq_kernels.kernels.triton import tile_choice

    kept = json.loads(path.read_text()) if path.exists() else {}
    head = {**kept, **found, "date": datetime.date.today().isoformat(), "torch": torch.__version__}
    write_whole(path, tile_choice.as_file(found["tiles"], head))


def _earlier(path: Path, name: str) -> dict[str, Any]:
    """What a file holds already; parts that an earlier version did not write are empty."""
    from ldmq_kernels.kernels.triton.tile_choice import current_key, tile_of

    empty: dict[str, Any] = {key: kind() for key, kind in _EMPTY.items()}
    if not path.exists():
        return {"gpu": name, **empty}
    try:
        content = json.loads(path.read_text())
        content["tiles"] = {current_key(key): tile_of(fields) for key, fields in content["tiles"].items()}
        if content["gpu"] != name:
            raise TuningError(f"{path} was measured on {content['gpu']}, this is {name}: choose another file")
        found = {key: content.get(key, nothing) for key, nothing in empty.items()}
        for key, kind in _EMPTY.items():
            if not isinstance(found[key], kind):
                raise TypeError(f"{key!r} is {found[key]!r}")
        found["milliseconds"] = {current_key(key): taken for key, taken in found["milliseconds"].items()}
        found["refused"] = {current_key(key): _current_refusals(lines) for key, lines in found["refused"].items()}
        return {"gpu": name, **found}
    except TuningError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TuningError(f"{path} is damaged ({error}): remove it to measure anew") from None


def _current_refusals(lines: list[list[Any]]) -> list[list[Any]]:
    """Refused tiles with their reasons, in the words of this version; a CUDA tile is its name."""
    from ldmq_kernels.kernels.triton.tile_choice import tile_of

    return [[asdict(tile_of(tile)) if isinstance(tile, dict) else tile, why] for tile, why in lines]


def _measure(call: Call, parts: dict[str, str], device: torch.device, timer: Clock, found: dict[str, Any]) -> None:
    """Add the fastest tile of each GEMM that a call makes, and the faster backend, to `found`."""
    from ldmq_kernels.kernels.triton import tile_choice

    arguments = call.make()
    run = partial(getattr(ops, call.op), *arguments)
    with torch.inference_mode():
        if "triton" in parts:
            with dispatch.use_backend("triton"):
                _measure_triton(run, device, timer, found)
            found["seen"].append(parts["triton"])
        if RIVAL in parts:
            best = partial(tile_choice.chosen_by, lambda table, problem: found["tiles"].get(f"{table} {problem}"))
            compete(call, arguments, run, best, device, timer, found)
            found["seen"].append(parts[RIVAL])


def _measure_triton(run: Run, device: torch.device, timer: Clock, found: dict[str, Any]) -> None:
    from ldmq_kernels.kernels.triton import tile_choice
    from ldmq_kernels.kernels.triton.tile_choice import Problem

    asked: list[tuple[str, Problem]] = []
    with tile_choice.chosen_by(lambda table, problem: asked.append((table, problem))):
        run()
    for table, problem in asked:
        key = f"{table} {problem}"
        if key in found["tiles"]:
            continue
        tiles = Tiles(key, _shortlist(table, problem, device), tile_choice.forced, asdict)
        times = fastest(run, tiles, device, timer, found["refused"])
        if times:
            best, first = min(times, key=lambda tile: times[tile]), next(iter(times))
            found["tiles"][key], found["milliseconds"][key] = best, [times[best], times[first]]


def _shortlist(table: str, problem: Any, device: torch.device) -> list[Any]:
    """The tiles with the least estimate, and their persistent forms."""
    from ldmq_kernels.kernels.triton import tile_choice

    gpu = gpu_of(device)
    tiles = tile_choice.candidates(table, problem, gpu)
    known = set(tiles)
    plain = sorted((t for t in tiles if not t.persistent), key=lambda t: tile_choice.estimate(t, problem, gpu))
    kept = plain[:SHORTLIST]
    forms = [replace(tile, persistent=True, splittable=False) for tile in kept[:3] if tile.split_k == 1]
    return kept + [tile for tile in forms if tile in known]
