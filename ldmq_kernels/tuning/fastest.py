"""The fastest of a backend's tiles for a call: each is launched once, then all are timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")
Run = Callable[[], Any]
Timer = Callable[[Run, torch.device], float]
Context = Callable[[], AbstractContextManager[Any]]
ROUNDS = 9


class TuningError(ValueError):
    """There is nothing to tune here, or the file cannot be gone on with."""


@dataclass(frozen=True)
class Tiles:
    """What a backend may take for a product.

    key: the product, in the file's "refused".
    choices: the most promising first.
    forced: makes everything inside a block take one.
    written: what the file has for one.
    """

    key: str
    choices: list[Any]
    forced: Callable[[Any], AbstractContextManager[Any]]
    written: Callable[[Any], Any]


def in_turns(run: Run, device: torch.device, timer: Timer, contexts: Mapping[Name, Context]) -> dict[Name, float]:
    """Median milliseconds of a call inside each of these contexts."""
    times: dict[Name, list[float]] = {name: [] for name in contexts}
    for _ in range(ROUNDS):
        for name, context in contexts.items():
            with context():
                times[name].append(timer(run, device))
    return {name: statistics.median(taken) for name, taken in times.items()}


def fastest(
    run: Run,
    tiles: Tiles,
    device: torch.device,
    timer: Timer,
    refused: dict[str, list[list[Any]]],
    check: Callable[[Any], str] = lambda _: "",
) -> dict[Any, float]:
    """Time a call with each tile that launches.

    Args:
        run: the call.
        tiles: to try.
        device: where.
        timer: milliseconds of a call on a device.
        refused: by key, tiles that do not launch with the reason; they are added, and not tried again.
        check: what is wrong with the call's result, or nothing; a tile whose result is wrong is refused.

    Returns:
        Median milliseconds by tile, in the order of `tiles`.

    Raises:
        TuningError: a tile left the device unusable.
    """
    earlier = refused.get(tiles.key, [])
    launchable = []
    for tile in tiles.choices:
        written = tiles.written(tile)
        if any(known == written for known, _ in earlier):
            continue
        fatal = None
        try:
            with tiles.forced(tile):
                problem = check(run())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # a tile that this GPU cannot launch is no reason to stop
            problem = f"{type(error).__name__}: {error}"[:300]
            fatal = error if "CUDA error" in problem else None
        if not problem:
            launchable.append(tile)
            continue
        refused[tiles.key] = earlier = [*earlier, [written, problem]]
        if fatal is not None:
            raise TuningError(
                f"{tiles.key} with {tile} ended in a {fatal}: nothing more can run in this process; the tile is noted, "
                "run `ldmq bench --tune` again to go on without it"
            ) from fatal
    return in_turns(run, device, timer, {tile: partial(tiles.forced, tile) for tile in launchable})
