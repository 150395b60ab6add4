"""Which tile a matrix product takes: the one measured for this GPU and shape, or the best estimate of a small table.

Nothing is measured when an op runs. `ldmq bench --tune` measures and writes the file that `measured` reads;
without it `estimate` chooses among the table's tiles by how well they fill the GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, replace
from typing import NamedTuple

import torch

from ldmq_kernels.kernels import measurements
from ldmq_kernels.kernels.gpu import Gpu, cache_folder, file_name, gpu_of
from ldmq_kernels.kernels.triton.candidates import CANDIDATES, Tile, family

SPLITS = (1, 2, 3, 4, 6, 8)
FEWEST_STEPS = 4  # of a split's main loop
# in products of one multiprocessor's int8 tensor cores at its full rate, about 4096 a clock
START_AND_END = 8e6  # filling a tile's pipeline and storing it
ANOTHER_LAUNCH = 20e6  # adding up the splits


class Problem(NamedTuple):
    """An output of `groups` matrices of rows x columns, each element a sum of `depth` products."""

    rows: int
    columns: int
    depth: int
    groups: int = 1

    def __str__(self) -> str:
        return "x".join(map(str, self if self.groups > 1 else self[:3]))


Chooser = Callable[[str, Problem], Tile | None]
_override: ContextVar[Chooser | None] = ContextVar("ldmq_triton_tile", default=None)


def estimate(tile: Tile, problem: Problem, gpu: Gpu) -> float:
    """Relative time of a tile: waves of programs over the multiprocessors, each as long as its main loop."""
    programs = tile.programs(problem.rows, problem.columns) * problem.groups * tile.splits
    waves = -(-programs // gpu.multiprocessors)
    steps = -(-problem.depth // (tile.depth * tile.splits))
    work = tile.rows * tile.columns * tile.depth * steps / tile.share
    return waves * (work + START_AND_END) + (ANOTHER_LAUNCH if tile.splits > 1 else 0)


def candidates(op: str, problem: Problem, gpu: Gpu) -> list[Tile]:
    """The table's tiles for an op on this architecture, each also split along the depth where it can be."""
    tiles = CANDIDATES[op][family(gpu.capability)]
    return [
        replace(tile, splits=splits)
        for tile in tiles
        for splits in (SPLITS if tile.splittable else (1,))
        if splits == 1 or problem.depth >= splits * FEWEST_STEPS * tile.depth
    ]


@measurements.emptied_by_forget
@functools.cache
def measured(gpu: Gpu) -> dict[str, Tile]:
    """Tile by "op problem", as `ldmq bench --tune` wrote it; the user's file before the one that ships.

    Raises:
        ValueError: a file is damaged.
    """
    tiles: dict[str, Tile] = {}
    for path in (measurements.SHIPPED / file_name(gpu), cache_folder() / file_name(gpu)):
        if path.exists():
            try:
                found = json.loads(path.read_text())["tiles"]
                tiles |= {key: Tile(**fields) for key, fields in found.items()}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} is damaged ({error}): remove it, or run `ldmq bench --tune` again") from None
    return tiles


def as_file(tiles: dict[str, Tile], head: dict[str, object]) -> bytes:
    """What `measured` reads back: `head` says where, when and with what the tiles were measured."""
    return (json.dumps({**head, "tiles": {key: asdict(tile) for key, tile in tiles.items()}}, indent=1) + "\n").encode()


@measurements.emptied_by_forget
@functools.lru_cache(maxsize=4096)
def _chosen(op: str, problem: Problem, gpu: Gpu) -> Tile:
    found = measured(gpu).get(f"{op} {problem}")
    if found is not None:
        return found
    # whether persistence pays, no estimate tells
    plain = [tile for tile in candidates(op, problem, gpu) if not tile.persistent]
    return min(plain, key=lambda tile: estimate(tile, problem, gpu))


def choose(op: str, problem: Problem, device: torch.device) -> Tile:
    """The tile for an op's problem on a device."""
    chooser = _override.get()
    forced = None if chooser is None else chooser(op, problem)
    return forced or _chosen(op, problem, gpu_of(device))


def grid(tile: Tile, tile_rows: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Programs of a launch over so many tiles of rows, and splits; a persistent tile fills the multiprocessors once."""
    programs = tile_rows * -(-columns // tile.columns)
    if tile.persistent:
        programs = min(programs, gpu_of(device).multiprocessors)
    return programs, tile.splits


@contextlib.contextmanager
def chosen_by(chooser: Chooser) -> Iterator[None]:
    """Ask `chooser` for every tile inside the block; where it gives None, the usual choice holds."""
    token = _override.set(chooser)
    try:
        yield
    finally:
        _override.reset(token)


def forced(tile: Tile) -> contextlib.AbstractContextManager[None]:
    """Take this tile for everything inside the block: for the tuner and for tests."""
    return chosen_by(lambda _op, _problem: tile)
