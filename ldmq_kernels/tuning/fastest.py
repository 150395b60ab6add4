"""The fastest of a backend's tiles for a call: each is launched once, then all are timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ldmq_kernels.timing import Clock, interleaved

Run = Callable[[], Any]


class TuningError(ValueError):
    """There is nothing to tune here, or the file cannot be gone on with."""


@dataclass(frozen=True)
class Candidates:
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


def launchable(
    run: Run,
    candidates: Candidates,
    device: torch.device,
    refused: dict[str, list[list[Any]]],
    check: Callable[[Any], str],
) -> list[Any]:
    """The tiles that launch, and whose result is right.

    Args:
        run: the call.
        candidates: to try.
        device: where.
        refused: by key, tiles that do not launch with the reason; they are added, and not tried again.
        check: what is wrong with the call's result, or nothing; a tile whose result is wrong is refused.

    Raises:
        TuningError: a tile left the device unusable.
    """
    earlier = refused.get(candidates.key, [])
    found = []
    for tile in candidates.choices:
        written = candidates.written(tile)
        if any(known == written for known, _ in earlier):
            continue
        fatal = None
        try:
            with candidates.forced(tile):
                problem = check(run())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # a tile that this GPU cannot launch is no reason to stop
            problem = f"{type(error).__name__}: {error}"[:300]
            fatal = error if "CUDA error" in problem else None
        if not problem:
            found.append(tile)
            continue
        refused[candidates.key] = earlier = [*earlier, [written, problem]]
        if fatal is not None:
            raise TuningError(
                f"{candidates.key} with {tile} ended in a {fatal}: nothing more can run in this process; the tile is "
                "noted, run `ldmq bench --tune` again to go on without it"
            ) from fatal
    return found


def fastest(
    run: Run,
    candidates: Candidates,
    device: torch.device,
    timer: Clock,
    refused: dict[str, list[list[Any]]],
    check: Callable[[Any], str],
) -> dict[Any, float]:
    """Time a call with each tile that launches; arguments as of `launchable`.

    Args:
        timer: milliseconds of a call on a device.

    Returns:
        Median milliseconds by tile, in the order of `candidates`.

    Raises:
        TuningError: a tile left the device unusable.
    """
    tiles = launchable(run, candidates, device, refused, check)
    contexts = {tile: partial(candidates.forced, tile) for tile in tiles}
    samples = interleaved(dict.fromkeys(tiles, run), device, warm_up=0, clock=timer, contexts=contexts)
    return {tile: taken.median for tile, taken in samples.items()}
