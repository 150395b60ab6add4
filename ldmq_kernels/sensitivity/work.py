"""Long work cut into items: resumed after a kill, spread over processes, with the same results to the bit.

Each item's result is a function of the item alone, so it does not matter who computes it, or when. In a folder
each result is a file that is written whole; processes of torch.distributed take every n-th item and gather.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from ldmq_kernels.files import write_whole
from ldmq_kernels.progress import track

Result = TypeVar("Result")


FORMAT = 2  # of the results: 1 had classes of other names


class WorkError(ValueError):
    """A folder that holds the work of something else."""


def processes() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gathered(mine: dict[str, Result]) -> dict[str, Result]:
    """The results of all processes together."""
    _, world = processes()
    if world == 1:
        return mine
    parts: list[Any] = [None] * world
    distributed.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


class Work:
    """Results by stage and item, in memory alone or in a folder.

    Args:
        folder: where results are kept; None keeps nothing.
        settings: what the results depend on, as JSON.

    Raises:
        WorkError: the folder holds results of other settings.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        if folder is None:
            return
        settings = {**settings, "format": FORMAT}
        path = folder / "settings.json"
        rank, _ = processes()
        if path.exists():
            earlier = json.loads(path.read_text())
            if earlier.get("format") != FORMAT:
                raise WorkError(f"{folder} holds work of another version of ldmq_kernels: give another folder")
            different = [key for key in {*earlier, *settings} if earlier.get(key) != settings.get(key)]
            if different:
                key = sorted(different)[0]
                raise WorkError(
                    f"{folder} holds work that was done with another {key} ({earlier.get(key)!r}, now "
                    f"{settings.get(key)!r}): go on with the same settings, or give another folder"
                )
        elif rank == 0:
            write_whole(path, json.dumps(settings, indent=1).encode())

    def _path(self, stage: str, item: str) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(item.encode()).hexdigest()[:16]
        return self._folder / stage / f"{digest}.pt"

    def _load(self, stage: str, item: str) -> Any | None:
        path = self._path(stage, item)
        if path is None or not path.exists():
            return None
        return torch.load(path, weights_only=False)

    def _save(self, stage: str, item: str, result: Any) -> None:
        path = self._path(stage, item)
        if path is not None:
            buffer = io.BytesIO()
            torch.save(result, buffer)
            write_whole(path, buffer.getvalue())

    def run(
        self,
        stage: str,
        items: Sequence[str],
        compute: Callable[[list[str]], Iterator[tuple[str, Result]]],
        *,
        show: bool,
    ) -> dict[str, Result]:
        """The results of all items, in their order, computing those that are missing.

        Args:
            compute: given the items that this process is to do, yields each with its result when it is done.
        """
        rank, world = processes()
        mine = list(items)[rank::world]
        results = {item: result for item in mine if (result := self._load(stage, item)) is not None}
        missing = [item for item in mine if item not in results]
        for item, result in track(compute(missing), stage, len(missing), show=show and rank == 0):
            self._save(stage, item, result)
            results[item] = result
        everything = gathered(results)
        return {item: everything[item] for item in items if item in everything}
