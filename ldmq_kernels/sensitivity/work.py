"""Long work cut into items: resumed after a kill, spread over processes, with the same results to the bit.

Each item's result is a function of the item alone, so it does not matter who computes it, or when. In a folder
each result is a file that is written whole; processes of torch.distributed take every n-th item and gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed

from ldmq_kernels.progress import track
from ldmq_kernels.sensitivity.stored import Stored
from ldmq_kernels.sensitivity.work_folder import WorkFolder

Result = TypeVar("Result")


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
        WorkError: the folder is not private, or holds something else than results of these settings.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else WorkFolder(folder, settings)

    def run(
        self,
        stage: str,
        items: Sequence[str],
        compute: Callable[[list[str]], Iterator[tuple[str, Result]]],
        *,
        store: Callable[[Result], Stored],
        restore: Callable[[str, Stored], Result],
        show: bool,
    ) -> dict[str, Result]:
        """The results of all items, in their order, computing those that are missing.

        Args:
            compute: given the items that this process is to do, yields each with its result when it is done.
            store: a result in the form that files take.
            restore: the result of an item from that form.
        """
        rank, world = processes()
        mine = list(items)[rank::world]
        results: dict[str, Result] = {}
        if self._folder is not None:
            known = {item: self._folder.load(stage, item) for item in mine}
            results = {item: restore(item, stored) for item, stored in known.items() if stored is not None}
        missing = [item for item in mine if item not in results]
        for item, result in track(compute(missing), stage, len(missing), show=show and rank == 0):
            if self._folder is not None:
                self._folder.save(stage, item, store(result))
            results[item] = result
        everything = gathered(results)
        return {item: everything[item] for item in items if item in everything}
