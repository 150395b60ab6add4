"""Which tile a GEMM takes: the one measured for this GPU and shape, or the best estimate of a small table.

Nothing is measured when an op runs. `ldmq bench --tune` measures and writes the file that `measured` reads;
without it `estimate` chooses among the table's tiles by how well they fill the GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ldmq_kernels.files import shortened
from ldmq_kernels.kernels import measurements, tile_cost
from ldmq_kernels.kernels.gpu import Gpu, cache_folder, file_name, gpu_of
from ldmq_kernels.kernels.triton.tile_tables import TILES, Tile, family

SPLIT_K = (1, 2, 3, 4, 6, 8)
FEWEST_STEPS = 4  # of the main loop of each program of split-K
RATE = tile_cost.INT8_PRODUCTS[90]  # on every GPU: tiles are weighed against each other alone, by their efficiency
# the words of files of measured tiles that earlier versions wrote
_EARLIER_FIELDS = {"rows": "m", "columns": "n", "depth": "k", "share": "efficiency", "splits": "split_k"}
_EARLIER_WORDS = {"pointers": "gather"}


def _is_power(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most and value & (value - 1) == 0


# what a file may say of a tile: Triton takes powers of two, and 160 columns are a kernel's own
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "m": lambda value: _is_power(value, 1024),
    "n": lambda value: value == 160 or _is_power(value, 1024),
    "k": lambda value: _is_power(value, 1024),
    "warps": lambda value: _is_power(value, 32),
    "stages": lambda value: type(value) is int and 1 <= value <= 16,
    "split_k": lambda value: type(value) is int and 1 <= value <= 64,
    "efficiency": lambda value: type(value) in (int, float) and 0 < value <= 1,
    "splittable": lambda value: type(value) is bool,
    "persistent": lambda value: type(value) is bool,
    "transposed": lambda value: type(value) is bool,
    "ctas": lambda value: type(value) is int and 1 <= value <= 8,
}


class Problem(NamedTuple):
    """A GEMM of (m, k) by (n, k), or `groups` of them."""

    m: int
    n: int
    k: int
    groups: int = 1

    def __str__(self) -> str:
        return "x".join(map(str, self if self.groups > 1 else self[:3]))


Chooser = Callable[[str, Problem], Tile | None]
_override: ContextVar[Chooser | None] = ContextVar("ldmq_triton_tile", default=None)


def estimate(tile: Tile, problem: Problem, gpu: Gpu) -> float:
    """The clocks that a tile is expected to take; its efficiency counts for what its loads delay it.

    Programs that share a multiprocessor share its tensor cores: each takes longer, and fills and stores overlap.
    """
    programs = tile.programs(problem.m, problem.n) * problem.groups * tile.split_k
    steps = -(-problem.k // (tile.k * tile.split_k))
    clocks_of_step = tile_cost.step_clocks(tile.m * tile.n * tile.k, RATE * tile.efficiency)
    reduction = tile_cost.REDUCTION_LAUNCH if tile.split_k > 1 else 0.0
    return tile_cost.gemm_clocks(
        programs,
        gpu.multiprocessors * tile.ctas,
        steps,
        clocks_of_step * tile.ctas,
        tile_cost.FILL_AND_STORE,
        reduction,
    )


def candidates(op: str, problem: Problem, gpu: Gpu) -> list[Tile]:
    """The table's tiles for an op on this architecture, each also with split-K where it can have it."""
    return [
        replace(tile, split_k=split_k)
        for tile in TILES[op][family(gpu.capability)]
        for split_k in (SPLIT_K if tile.splittable else (1,))
        if split_k == 1 or problem.k >= split_k * FEWEST_STEPS * tile.k
    ]


def has_tma(device: torch.device) -> bool:
    """Whether descriptors pay: elsewhere Triton makes pointers of them, whose strides it does not know."""
    return gpu_of(device).capability >= 90


def tile_of(fields: dict[str, Any]) -> Tile:
    """A tile as a file of measurements has it, also one that an earlier version wrote.

    Raises:
        TypeError: a field is missing or unknown.
        ValueError: a field is none that any tile has.
    """
    tile = Tile(**{_EARLIER_FIELDS.get(name, name): value for name, value in fields.items()})
    for name, is_right in _CHECKS.items():
        value = getattr(tile, name)
        if not is_right(value):
            raise ValueError(f"a tile's {name} is {shortened(repr(value))}")
    return tile


def current_key(key: str) -> str:
    """A file's "op problem" in the words of this version."""
    return " ".join(_EARLIER_WORDS.get(word, word) for word in key.split(" "))


@measurements.emptied_by_forget
@functools.cache
def measured(gpu: Gpu) -> dict[str, Tile]:
    """Tile by "op problem", as `ldmq bench --tune` wrote it; the user's file before the one that ships.

    Raises:
        ValueError: a file is damaged.
    """
    tiles: dict[str, Tile] = {}
    for folder in (lambda: measurements.SHIPPED, cache_folder):
        try:
            path = folder() / file_name(gpu)
            found = measurements.read_file(path).get("tiles", {})
        except OSError:  # a user without a home that can be read, of which `measurements` tells
            continue
        try:
            tiles |= {current_key(key): tile_of(fields) for key, fields in found.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged ({shortened(error)}): remove it, or run `ldmq bench --tune` again"
            ) from None
    return tiles


@measurements.emptied_by_forget
@functools.lru_cache(maxsize=4096)
def _chosen(op: str, problem: Problem, gpu: Gpu) -> Tile:
    found = measured(gpu).get(f"{op} {problem}")
    if found is not None:
        return found
    return best_estimate(op, problem, gpu)


@functools.lru_cache(maxsize=4096)
def best_estimate(op: str, problem: Problem, gpu: Gpu) -> Tile:
    """The tile that an op takes on a GPU where nothing was measured."""
    # whether persistence pays, no estimate tells
    plain = [tile for tile in candidates(op, problem, gpu) if not tile.persistent]
    return min(plain, key=lambda tile: estimate(tile, problem, gpu))


def choose(op: str, problem: Problem, device: torch.device) -> Tile:
    """The tile for an op's problem on a device."""
    chooser = _override.get()
    forced = None if chooser is None else chooser(op, problem)
    return forced or _chosen(op, problem, gpu_of(device))


def grid(tile: Tile, tiles_m: int, n: int, device: torch.device) -> tuple[int, int]:
    """Programs of a launch over `tiles_m` tiles of rows, and split_k; persistent ones fill the multiprocessors once."""
    programs = tiles_m * -(-n // tile.n)
    if tile.persistent:
        programs = min(programs, gpu_of(device).multiprocessors)
    return programs, tile.split_k


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
