"""Which compiled tile a GEMM takes: the one measured for this GPU and shape, or the best estimate."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch

from ldmq_kernels.kernels import measurements, tile_cost
from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.gpu import Gpu, gpu_of

HOPPER = 90
SPLIT_K = (1, 2, 3, 4, 6, 8)  # as Triton's; of convolutions
FEWEST_STEPS = 4  # of the main loop of each part of K
SUM_BYTES = 4  # of a partial sum
_override: ContextVar[Tile | None] = ContextVar("ldmq_cuda_tile", default=None)


class Tile(NamedTuple):
    """A tile of the output as the extension holds it, at this place of its list, and the blocks that share its K."""

    place: int
    op: str
    family: int
    m: int
    n: int
    k: int
    stages: int
    cluster: int
    cooperative: bool
    split_k: int = 1

    @property
    def name(self) -> str:
        """As the file of measurements has it, such as "sm90 256x160x128x4 cooperative cluster 2 split-K 2"."""
        kind = " cooperative" if self.cooperative else ""
        cluster = f" cluster {self.cluster}" if self.cluster > 1 else ""
        split = f" split-K {self.split_k}" if self.split_k > 1 else ""
        return f"sm{self.family} {self.m}x{self.n}x{self.k}x{self.stages}{kind}{cluster}{split}"


@functools.cache
def _tiles() -> tuple[Tile, ...]:
    return tuple(Tile(place, *fields) for place, fields in enumerate(extension.binding().tiles()))


def runs_on(tile: Tile, gpu: Gpu) -> bool:
    """Whether a GPU runs a tile: wgmma's on Hopper alone, mma.sync's from their family on."""
    return gpu.capability == HOPPER or tile.family <= min(gpu.capability, HOPPER - 1)


def _of(op: str, gpu: Gpu) -> list[Tile]:
    """The tiles of an op that a GPU runs and the extension has code for."""
    binding = extension.binding()
    return [
        tile
        for tile in _tiles()
        if tile.op == op and runs_on(tile, gpu) and extension.holds_code(binding, gpu.capability, tile.family)
    ]


def step_clocks(tile: Tile, rate: float) -> float:
    """Clocks of one step of a tile's main loop: its products, its loads, or what promoting FP8's sums takes.

    On Hopper two warpgroups share a tile of FP8. Where registers allow it, each has two products in flight, as
    multiply_e4m3 of csrc/sm90_multiply.cuh has it; else it adds up one before it issues the next, and only the other
    warpgroup's products are in flight meanwhile.

    Args:
        tile: one of the extension's.
        rate: multiply-adds of a multiprocessor in a clock.
    """
    shared = (tile.n / 2, tile.m) if tile.op == "linear_w4a8" else (tile.m, tile.n)
    products, loaded = tile.m * tile.n * tile.k, (shared[0] + shared[1] / tile.cluster) * tile.k
    clocks = tile_cost.step_clocks(products, rate, loaded)
    if not tile.op.endswith("fp8") or tile.family != HOPPER or (tile.m == 128 and tile.n <= 128):
        return clocks
    bands, additions = tile.m // 128, tile.n / 2
    return max(clocks, products / rate / 2 + bands * (tile_cost.PROMOTION + additions))


def estimate(tile: Tile, m: int, n: int, k: int, gpu: Gpu, taps: int = 1, rate: float | None = None) -> float:
    """The clocks that a tile is expected to take.

    A cluster has tiles one below the other, which share the weight's bytes. With an int4 weight, which is half as many
    bytes, the GEMM is transposed: they stand side by side and share those of x. The rate is of multiply-adds of a
    multiprocessor in a clock; without one, that of `INT8_PRODUCTS`. Split-K stores its sums, and reads them in a
    launch of its own.
    """
    below, beside = (1, tile.cluster) if tile.op == "linear_w4a8" else (tile.cluster, 1)
    tiles = -(-m // (tile.m * below)) * -(-n // (tile.n * beside)) * tile.cluster * tile.split_k
    steps = -(-taps * -(-k // (taps * tile.k)) // tile.split_k)  # a step has channels of one tap
    store = tile_cost.epilogue_clocks(tile.op, tile.m * tile.n)
    reduction = 0.0
    if tile.split_k > 1:
        store *= SUM_BYTES / 2
        reduction = tile_cost.reduction_clocks(tile.split_k * m * n * SUM_BYTES, gpu.multiprocessors)
    step, launch = step_clocks(tile, rate or tile_cost.INT8_PRODUCTS[tile.family]), tile_cost.PIPELINE_START + reduction
    # one tile is stored while the next is multiplied, the last alone
    if tile.family == HOPPER and not tile.cooperative:
        store, launch = 0.0, launch + tile_cost.HALF_OF_THREADS * store
    return tile_cost.gemm_clocks(tiles, gpu.multiprocessors, steps, step, tile_clocks=store, launch_clocks=launch)


def with_splits(tile: Tile, k: int) -> list[Tile]:
    """A tile, and for a convolution the same with its K shared by several blocks, which have a few steps each."""
    splits = SPLIT_K if tile.op.startswith("conv2d") else (1,)
    return [tile._replace(split_k=split) for split in splits if split == 1 or k >= split * FEWEST_STEPS * tile.k]


def candidates(op: str, m: int, n: int, k: int, device: torch.device, taps: int = 1) -> list[Tile]:
    """The tiles that this GPU runs for an op and shape, the least estimate first; empty for an op without tiles.

    Args:
        op: "linear_w8a8", "linear_static_w8a8", "linear_w4a8", "conv2d_w8a8", "linear_fp8" or "conv2d_fp8".
        m: tokens, or output pixels of all samples.
        n: output channels.
        k: input channels times taps.
        device: a CUDA device that the extension serves.
        taps: positions of a convolution's kernel.
    """
    gpu = gpu_of(device)
    tiles = [split for tile in _of(op.replace("_static", ""), gpu) for split in with_splits(tile, k)]
    return sorted(tiles, key=lambda tile: estimate(tile, m, n, k, gpu, taps))


@functools.lru_cache(4096)
def _chosen(
    op: str, m: int, n: int, k: int, device: torch.device, taps: int, measured: str | None, for_all: bool
) -> Tile | None:
    tiles = candidates(op, m, n, k, device, taps)
    if for_all:
        tiles = [tile for tile in tiles if tile.family < HOPPER]
    return next((tile for tile in tiles if tile.name == measured), tiles[0] if tiles else None)


def choose(op: str, m: int, n: int, k: int, device: torch.device, taps: int = 1, for_all: bool = False) -> Tile:
    """The tile that a GEMM takes.

    Args:
        op: as of `candidates`, like what follows.
        for_all: whether only the tiles for every GPU are asked, where Hopper's refuse the GEMM.

    Raises:
        Unsupported: the extension has none.
    """
    tile = _override.get()
    if tile is None:
        measured = measurements.section(device, "cuda_tiles").get(f"{op} {m}x{n}x{k}")
        tile = _chosen(op, m, n, k, device, taps, measured, for_all)
    if tile is None:
        raise Unsupported(
            f"the extension has no tile for {op} on {device}: build it again with this GPU in LDMQ_CUDA_ARCHS"
        )
    return tile


@contextlib.contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Take this tile for every GEMM inside the block: for the tuner and for tests."""
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
