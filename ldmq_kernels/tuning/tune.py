"""Measures the most promising tiles of every op and shape on this GPU, and keeps the fastest in a file.

The file is written after every shape, so a run that is cut short loses nothing, and the next one goes on with
what is not in it yet. No op measures anything when it runs; it reads this file.
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ldmq_kernels.files import write_whole
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels import triton as triton_backend
from ldmq_kernels.progress import track
from ldmq_kernels.tuning.calls import OPS, Call, calls
from ldmq_kernels.tuning.timing import one_call_ms

MODELS = ("sd15", "sdxl", "vae_decoder")
SHORTLIST = 8  # tiles by estimate, and the persistent forms of the best of them
ROUNDS = 9
Timer = Callable[[Callable[[], Any], torch.device], float]


class TuningError(ValueError):
    """There is nothing to tune here, or the file cannot be gone on with."""


def tune(
    device: torch.device,
    out: Path | None = None,
    *,
    seconds: float | None = None,
    names: tuple[str, ...] = OPS,
    models: tuple[str, ...] = MODELS,
    timer: Timer = one_call_ms,
    show: bool = True,
) -> tuple[Path, int]:
    """Measure, and write the fastest tiles for this kind of GPU.

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
    from ldmq_kernels.kernels.triton import configurations

    gpu = configurations.gpu_of(device)
    path = out or configurations.cache_folder() / configurations.file_name(gpu)
    found = _earlier(path, gpu.name)
    begin, todo = time.monotonic(), list(calls(names, models, device))
    for call in track(todo, "shapes", len(todo), show=show):
        if seconds is not None and time.monotonic() - begin > seconds:
            break
        key = f"{call.op} {call.shape}"
        if key in found["seen"]:
            continue
        try:
            _measure(call, device, timer, found)
            found["seen"].append(key)
        finally:
            head = {**found, "tiles": None, "date": datetime.date.today().isoformat(), "torch": torch.__version__}
            write_whole(path, configurations.as_file(found["tiles"], head))
    configurations.forget_measured()
    return path, len({f"{call.op} {call.shape}" for call in todo} - set(found["seen"]))


def _earlier(path: Path, name: str) -> dict[str, Any]:
    """What a file holds already."""
    from ldmq_kernels.kernels.triton.candidates import Tile

    empty: dict[str, Any] = {"gpu": name, "tiles": {}, "milliseconds": {}, "refused": {}, "seen": []}
    if not path.exists():
        return empty
    try:
        found = json.loads(path.read_text())
        found["tiles"] = {key: Tile(**fields) for key, fields in found["tiles"].items()}
        if found["gpu"] != name:
            raise TuningError(f"{path} was measured on {found['gpu']}, this is {name}: choose another file")
        return {key: found[key] for key in empty}
    except TuningError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TuningError(f"{path} is damaged ({error}): remove it to measure anew") from None


def _measure(call: Call, device: torch.device, timer: Timer, found: dict[str, Any]) -> None:
    """Add the fastest tile of each product that a call makes to `found`."""
    from ldmq_kernels.kernels.triton import configurations
    from ldmq_kernels.kernels.triton.configurations import Problem

    run = call.make()
    asked: list[tuple[str, Problem]] = []
    with dispatch.use_backend("triton"), torch.inference_mode():
        with configurations.chosen_by(lambda table, problem: asked.append((table, problem))):
            run()
        for table, problem in asked:
            key = f"{table} {problem}"
            if key in found["tiles"]:
                continue
            refused = found["refused"].setdefault(key, [])
            times: dict[Any, list[float]] = {
                tile: [] for tile in _launchable(run, _shortlist(table, problem, device), refused, device, key)
            }
            for _ in range(ROUNDS):
                for tile, taken in times.items():
                    with configurations.forced(tile):
                        taken.append(timer(run, device))
            if not refused:
                del found["refused"][key]
            if times:
                medians = {tile: statistics.median(taken) for tile, taken in times.items()}
                best, first = min(medians, key=lambda tile: medians[tile]), next(iter(medians))
                found["tiles"][key], found["milliseconds"][key] = best, [medians[best], medians[first]]


def _launchable(
    run: Callable[[], Any], tiles: list[Any], refused: list[list[Any]], device: torch.device, key: str
) -> Iterator[Any]:
    """The tiles that launch; the others go to `refused`, each with the reason, and are not tried again."""
    from ldmq_kernels.kernels.triton import configurations

    for tile in tiles:
        if any(fields == asdict(tile) for fields, _ in refused):
            continue
        try:
            with configurations.forced(tile):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # a tile that this GPU cannot launch is no reason to stop
            refused.append([asdict(tile), f"{type(error).__name__}: {error}"[:300]])
            if "CUDA error" in str(error):
                raise TuningError(
                    f"{key} with {tile} ended in a {error}: nothing more can run in this process; the tile is noted, "
                    "run `ldmq bench --tune` again to go on without it"
                ) from error
            continue
        yield tile


def _shortlist(table: str, problem: Any, device: torch.device) -> list[Any]:
    """The tiles with the least estimate, and their persistent forms."""
    from ldmq_kernels.kernels.triton import configurations

    gpu = configurations.gpu_of(device)
    tiles = configurations.candidates(table, problem, gpu)
    known = set(tiles)
    plain = sorted((t for t in tiles if not t.persistent), key=lambda t: configurations.estimate(t, problem, gpu))
    kept = plain[:SHORTLIST]
    forms = [replace(tile, persistent=True, splittable=False) for tile in kept[:3] if tile.splits == 1]
    return kept + [tile for tile in forms if tile in known]
