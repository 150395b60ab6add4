"""The one cost model by which the GPU backends choose a tile that was not measured, in clocks of a multiprocessor.

    clocks = waves * (steps * step_clocks + tile_clocks) + launch_clocks
    step_clocks = max(products / rate, bytes / L2_BYTES)

A wave is one tile on each multiprocessor, and a step one block of K. Only the order of tiles matters, never the figure.
The constants are estimates until they are measured on a GPU; `ldmq bench --tune` measures the tiles themselves.
"""

from __future__ import annotations

# int8 products of a multiprocessor in a clock, dense, by the family of the instruction: mma.sync as on A100's data
# sheet (624 TOPS, 108 multiprocessors, 1.41 GHz), wgmma as on H100's (1979 TOPS, 132, 1.83 GHz); set 2026-11-26
INT8_PRODUCTS = {80: 2048, 90: 4096}
L2_BYTES = 40  # that a multiprocessor loads from the L2 cache in a clock; assumed, 2026-11-26
STORED_BYTES = 16  # of the output that a multiprocessor stores in a clock; assumed, 2026-11-26
PIPELINE_START = 1500  # clocks from a launch to its first products; assumed, 2026-11-26
FILL_AND_STORE = 8e6 / 4096  # clocks to fill the pipeline of a tile and to store it; assumed, 2026-11-25
REDUCTION_LAUNCH = 20e6 / 4096  # clocks of the launch that reduces split-K's partial sums; assumed, 2026-11-25


def step_clocks(products: float, rate: float, loaded_bytes: float = 0.0) -> float:
    """Clocks of one step of a tile's main loop: its products, or its loads where they take longer.

    Args:
        products: multiply-adds of the step.
        rate: multiply-adds of a multiprocessor in a clock.
        loaded_bytes: bytes that the step loads; 0 where the rate already counts for them.
    """
    return max(products / rate, loaded_bytes / L2_BYTES)


def store_clocks(elements: int) -> float:
    """Clocks to store a tile's output of so many elements in 16 bit."""
    return elements * 2 / STORED_BYTES


def gemm_clocks(
    tiles: int,
    multiprocessors: int,
    steps: int,
    clocks_of_step: float,
    tile_clocks: float = 0.0,
    launch_clocks: float = 0.0,
) -> float:
    """Clocks of a GEMM.

    Args:
        tiles: tiles of the output, times split_k.
        multiprocessors: of the GPU.
        steps: steps of the main loop of each tile.
        clocks_of_step: what `step_clocks` gives.
        tile_clocks: clocks of each tile beside its main loop.
        launch_clocks: clocks that are spent once, whatever the number of tiles.
    """
    waves = -(-tiles // multiprocessors)
    return waves * (steps * clocks_of_step + tile_clocks) + launch_clocks
