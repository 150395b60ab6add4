"""What a product is expected to take by each backend: whole waves of the tile that it would choose."""

from __future__ import annotations

from dataclasses import dataclass

from ldmq_kernels.kernels import tile_cost
from ldmq_kernels.kernels.cuda import tiles as cuda_tiles
from ldmq_kernels.kernels.cuda.compiled_tiles import compiled_tiles
from ldmq_kernels.kernels.devices import Device
from ldmq_kernels.kernels.triton import tile_choice
from ldmq_kernels.kernels.triton.tile_tables import TILES, Tile, family
from ldmq_kernels.prediction.recorded import Gemm

HOPPER = 90
HALF_BYTES = 2
# m, n of what cuBLAS and cuDNN choose among in 16 bit, with steps of 64
LIBRARY_TILES = tuple((m, n) for m in (64, 128, 256) for n in (64, 128, 160, 192, 256) if m * n <= 128 * 256)
LIBRARY_STEP = 64
LIBRARY_SPLITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class GemmTime:
    """What a product takes.

    Attributes:
        clocks: of a multiprocessor, from the launch to the last store.
        tile: in words.
        waves: tiles to each multiprocessor, before they are rounded up.
        loop_share: the part of the tensor cores' dense rate that the main loop can reach, in (0, 1].
        launches: kernels.
    """

    clocks: float
    tile: str
    waves: float
    loop_share: float
    launches: int = 1


def by_triton(op: str, gemm: Gemm, device: Device) -> GemmTime:
    """By this package's Triton kernels, with the tile that they choose where nothing was measured."""
    gpu = device.gpu
    table = _table(op, gemm, device)
    tile = tile_choice.best_estimate(table, tile_choice.Problem(*gemm[:3], gemm.groups), gpu)
    is_half = op.endswith("a16")
    rate = device.products(rate_of(op, device))
    products = tile.m * tile.n * tile.k
    loaded = (tile.m + tile.n / (2 if op.endswith("w4a8") else 1)) * tile.k * (HALF_BYTES if is_half else 1)
    alone, shared = products / rate, tile.ctas * products / rate  # tensor cores that several programs share
    if device.capability == HOPPER and op.endswith(("w8a8", "w4a8")):
        step = max(shared, alone + _lost_clocks(op, tile), tile.ctas * loaded / tile_cost.L2_BYTES)
    else:
        step = tile_cost.step_clocks(shared, tile.efficiency, tile.ctas * loaded)
    steps = gemm.taps * -(-gemm.k // (gemm.taps * tile.k))  # a step has channels of one tap
    programs = tile.programs(gemm.m, gemm.n) * gemm.groups * tile.split_k
    clocks = tile_cost.gemm_clocks(
        programs,
        gpu.multiprocessors * tile.ctas,
        -(-steps // tile.split_k),
        step,
        tile_cost.PIPELINE_START + tile_cost.epilogue_clocks(op, tile.m * tile.n),
        tile_cost.REDUCTION_LAUNCH if tile.split_k > 1 else 0.0,
    )
    words = f"{tile.m}x{tile.n}x{tile.k}" + f" x {tile.ctas}" * (tile.ctas > 1) + " T" * tile.transposed
    words += f" split {tile.split_k}" * (tile.split_k > 1)
    waves = programs / (gpu.multiprocessors * tile.ctas)
    return GemmTime(clocks, words, waves, shared / step, 1 + (tile.split_k > 1))


def rate_of(op: str, device: Device) -> float:
    """Operations of the tensor cores for an op, or for torch's own in 16 bit, 10^12 a second.

    Raises:
        ValueError: a device without FP8.
    """
    if op.endswith("fp8"):
        if device.fp8_tops is None:
            raise ValueError(f"{device.name} has no FP8: choose a scheme in int8, or a device from sm_89 on")
        return device.fp8_tops
    return device.int8_tops if op.endswith(("w8a8", "w4a8")) else device.half_tops


def _table(op: str, gemm: Gemm, device: Device) -> str:
    """The table of tiles, as the launches choose it by alignment and by whether there is TMA."""
    channels = gemm.k // gemm.taps * gemm.groups
    if op.startswith("conv2d"):
        by_tma = device.capability >= HOPPER and gemm.groups == 1 and channels % 16 == 0
        return op if by_tma and family(device.capability) in TILES[op] else f"{op} gather"
    return f"{op} unaligned" if channels % 16 and f"{op} unaligned" in TILES else op


def _lost_clocks(op: str, tile: Tile) -> float:
    """Clocks of a step in which the tensor cores stand still in Triton's int8 loops on sm_90."""
    lost = tile_cost.DRAIN + (tile_cost.EXTRA_PRODUCT if tile.extra_n else 0)
    if op.startswith("conv2d"):
        lost += tile_cost.TAP_ADDRESS + (0 if tile.transposed else tile_cost.THROUGH_REGISTERS)
    return lost + (tile_cost.UNPACK if op.endswith("w4a8") else 0)


def by_cuda(op: str, gemm: Gemm, device: Device) -> GemmTime | None:
    """By this package's CUDA kernels; None for a product that they refuse."""
    channels, gpu = gemm.k // gemm.taps, device.gpu
    tiles = [
        split
        for tile in compiled_tiles(op)
        if cuda_tiles.runs_on(tile, gpu)
        for split in cuda_tiles.with_splits(tile, gemm.k)
    ]
    if not tiles or gemm.groups > 1 or channels % 16 or gemm.n % 8:
        return None
    dense = device.products(rate_of(op, device))
    rate = dense * tile_cost.ASYNCHRONOUS_SHARE
    # the order is the extension's own, without the share: it is the same for all
    tile = min(tiles, key=lambda tile: cuda_tiles.estimate(tile, gemm.m, gemm.n, gemm.k, gpu, gemm.taps))
    count = -(-gemm.m // tile.m) * -(-gemm.n // tile.n) * tile.split_k
    share = tile.m * tile.n * tile.k / dense / cuda_tiles.step_clocks(tile, rate)
    clocks = cuda_tiles.estimate(tile, gemm.m, gemm.n, gemm.k, gpu, gemm.taps, rate)
    return GemmTime(clocks, tile.name, count / gpu.multiprocessors, share, 1 + (tile.split_k > 1))


def by_library(gemm: Gemm, device: Device) -> GemmTime:
    """In 16 bit by cuBLAS or cuDNN: the best of common tiles, loads and products overlapped, stores behind products."""
    rate = device.products(device.half_tops) * tile_cost.ASYNCHRONOUS_SHARE
    steps = gemm.taps * -(-gemm.k // (gemm.taps * LIBRARY_STEP))
    found: list[GemmTime] = []
    for m, n in LIBRARY_TILES:
        products = m * n * LIBRARY_STEP
        step = tile_cost.step_clocks(products, rate, (m + n) * LIBRARY_STEP * HALF_BYTES)
        for split in LIBRARY_SPLITS:
            count = -(-gemm.m // m) * -(-gemm.n // n) * gemm.groups * split
            clocks = tile_cost.gemm_clocks(
                count,
                device.multiprocessors,
                -(-steps // split),
                step,
                launch_clocks=tile_cost.PIPELINE_START
                + tile_cost.store_clocks(m * n)
                + (tile_cost.REDUCTION_LAUNCH if split > 1 else 0.0),
            )
            share = products / device.products(device.half_tops) / step
            words = f"{m}x{n}x{LIBRARY_STEP}" + f" split {split}" * (split > 1)
            found.append(GemmTime(clocks, words, count / device.multiprocessors, share, 1 + (split > 1)))
    return min(found, key=lambda time: time.clocks)
