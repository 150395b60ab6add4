"""Which compiled tile an int8 product takes: the one measured for this GPU and shape, or the best estimate."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch

from ldmq_kernels.kernels import measurements
from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.gpu import Gpu, gpu_of

HOPPER = 90
# of one multiprocessor and clock: int8 products at the full rate by family, and bytes from the second-level cache
PRODUCTS = {80: 2048, 90: 4096}
CACHE_BYTES = 40
START = 1500  # clocks until a tile's first products
STORE_BYTES = 16  # of the output, a multiprocessor and clock

_override: ContextVar[Tile | None] = ContextVar("ldmq_cuda_tile", default=None)


class Tile(NamedTuple):
    """A tile of the output as the extension holds it, at this place of its list."""

    place: int
    op: str
    family: int
    rows: int
    columns: int
    depth: int
    stages: int
    cluster: int
    cooperative: bool

    @property
    def name(self) -> str:
        """As the file of measurements has it, such as "sm90 256x160x128x4 cooperative cluster 2"."""
        kind = " cooperative" if self.cooperative else ""
        cluster = f" cluster {self.cluster}" if self.cluster > 1 else ""
        return f"sm{self.family} {self.rows}x{self.columns}x{self.depth}x{self.stages}{kind}{cluster}"


@functools.cache
def _tiles() -> tuple[Tile, ...]:
    return tuple(Tile(place, *fields) for place, fields in enumerate(extension.binding().tiles()))


def _of(op: str, gpu: Gpu) -> list[Tile]:
    """The tiles of an op that a GPU runs: wgmma's on Hopper alone, mma.sync's on all."""
    return [tile for tile in _tiles() if tile.op == op and (tile.family < HOPPER or gpu.capability == HOPPER)]


def estimate(tile: Tile, rows: int, columns: int, depth: int, gpu: Gpu, taps: int = 1) -> float:
    """Clocks of a product: waves of tiles, each as long as its products or its bytes take.

    A cluster has tiles one below the other, which share the weight's bytes. With an int4 weight, which is half as many
    bytes, the product is transposed: they stand side by side and share those of x.
    """
    if tile.op == "linear_w4a8":
        below, beside = 1, tile.cluster
        bytes_of_channel = tile.columns / 2 + tile.rows / tile.cluster
    else:
        below, beside = tile.cluster, 1
        bytes_of_channel = tile.rows + tile.columns / tile.cluster
    blocks = -(-rows // (tile.rows * below)) * -(-columns // (tile.columns * beside)) * tile.cluster
    waves = -(-blocks // gpu.multiprocessors)
    steps = taps * -(-depth // (taps * tile.depth))  # a step has channels of one tap
    products = tile.rows * tile.columns * tile.depth / PRODUCTS[tile.family]
    bytes_in = bytes_of_channel * tile.depth / CACHE_BYTES
    store = tile.rows * tile.columns * 2 / STORE_BYTES
    alternates = tile.family == HOPPER and not tile.cooperative  # one tile is stored while the next is multiplied
    return waves * (steps * max(products, bytes_in) + (0 if alternates else store)) + START + store


def candidates(op: str, rows: int, columns: int, depth: int, device: torch.device, taps: int = 1) -> list[Tile]:
    """The tiles that this GPU runs for an op and shape, the least estimate first; empty for an op without tiles.

    Args:
        op: "linear_w8a8", "linear_static_w8a8", "linear_w4a8" or "conv2d_w8a8".
        rows: of the output: tokens, or pixels of all samples.
        columns: output channels.
        depth: products of an output: input channels times taps.
        device: a CUDA device that the extension serves.
        taps: of a convolution's kernel.
    """
    gpu = gpu_of(device)
    tiles = _of(op.replace("_static", ""), gpu)
    return sorted(tiles, key=lambda tile: estimate(tile, rows, columns, depth, gpu, taps))


@functools.lru_cache(4096)
def _chosen(
    op: str, rows: int, columns: int, depth: int, device: torch.device, taps: int, measured: str | None, for_all: bool
) -> Tile | None:
    tiles = candidates(op, rows, columns, depth, device, taps)
    if for_all:
        tiles = [tile for tile in tiles if tile.family < HOPPER]
    return next((tile for tile in tiles if tile.name == measured), tiles[0] if tiles else None)


def choose(
    op: str, rows: int, columns: int, depth: int, device: torch.device, taps: int = 1, for_all: bool = False
) -> Tile:
    """The tile that a product takes.

    Args:
        op: as of `candidates`, like what follows.
        for_all: among those for every GPU, where Hopper's do not take the product.

    Raises:
        Unsupported: the extension has none.
    """
    tile = _override.get()
    if tile is None:
        measured = measurements.cuda_tiles(device).get(f"{op} {rows}x{columns}x{depth}")
        tile = _chosen(op, rows, columns, depth, device, taps, measured, for_all)
    if tile is None:
        raise Unsupported(f"the extension has no tile for {op} on {device}")
    return tile


@contextlib.contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Take this tile for every product inside the block: for the tuner and for tests."""
    token = _override.set(tile)
    try:
        yield
    finally:
        _override.reset(token)


def is_forced() -> bool:
    """Whether this is inside a block of `forced`."""
    return _override.get() is not None


def forget() -> None:
    """Ask the extension again at the next choice."""
    _tiles.cache_clear()
    _chosen.cache_clear()
