"""The one cost model of GEMMs, in clocks of a multiprocessor: tiles are chosen by it, and times are predicted.

    clocks = waves * (steps * step_clocks + tile_clocks) + launch_clocks
    step_clocks = max(products / rate, bytes / L2_BYTES)

A wave is one tile on each multiprocessor, and a step one block of K. For the choice of a tile only the order matters;
`ldmq_kernels.prediction` adds what the compiled loops are known to lose, for times of a device that is not there. The
constants are estimates until they are measured on a GPU; `ldmq bench --tune` measures the tiles themselves.
"""

from __future__ import annotations

# int8 products of a multiprocessor in a clock, dense, by the family of the instruction: mma.sync as on A100's data
# sheet (624 TOPS, 108 multiprocessors, 1.41 GHz), wgmma as on H100's (1979 TOPS, 132, 1.83 GHz); set 2026-11-26.
# FP8 has the rate of wgmma, and one of mma.sync as on L40S's (733 TFLOPS, 142, 2.52 GHz); set 2026-11-29
INT8_PRODUCTS = {80: 2048, 89: 1024, 90: 4096}
L2_BYTES = 40  # that a multiprocessor loads from the L2 cache in a clock; assumed, 2026-11-26
STORED_BYTES = 16  # of the output that a multiprocessor stores in a clock; assumed, 2026-11-26
HALF_OF_THREADS = 1.5  # times as long as by all of them a tile is stored by one of two warpgroups; assumed, 2026-11-30
GELU_INSTRUCTIONS = 40  # of an output of GEGLU in an epilogue, scales and rounding too, in machine code of sm_90a
LANES = 128  # float32 instructions of a multiprocessor in a clock
PIPELINE_START = 1500  # clocks from a launch to its first products; assumed, 2026-11-26
FILL_AND_STORE = 8e6 / 4096  # clocks to fill the pipeline of a tile and to store it; assumed, 2026-11-25
REDUCTION_LAUNCH = 20e6 / 4096  # clocks of the launch that reduces split-K's partial sums; assumed, 2026-11-25
# what a step of Triton's int8 loops loses on sm_90, where `wgmma.wait_group 0` ends each product: the machine code has
# the waits and barriers, the clocks are assumed, 2026-11-29
DRAIN = 250  # until the tensor cores are empty, the barriers passed and the next product is issued
EXTRA_PRODUCT = 214  # the same of the second accumulator of 160 columns, and its reads of shared memory
TAP_ADDRESS = 20  # a convolution's tap and channels of a step, by multiplications, before its loads
THROUGH_REGISTERS = 16  # an image tile that is no operand as it lies in shared memory
UNPACK = 250  # int4 weights to int8 in registers
# of a CUDA warpgroup on sm_90 between two products of FP8 where one alone is in flight: until it has seen the first one
# done and the second is issued, without the additions in between; assumed, 2026-11-29
PROMOTION = 150
ASYNCHRONOUS_SHARE = 0.93  # of the tensor cores' rate, of loops that overlap products and loads; assumed, 2026-11-29


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


def epilogue_clocks(op: str, elements: int) -> float:
    """Clocks of the epilogue of a tile of so many sums, by the op: with GEGLU half of them are stored, in 8 bit."""
    if "geglu" not in op:
        return store_clocks(elements)
    outputs = elements / 2
    return outputs / STORED_BYTES + outputs * GELU_INSTRUCTIONS / LANES


def reduction_clocks(loaded_bytes: float, multiprocessors: int) -> float:
    """Clocks of the launch that adds split-K's partial sums, of so many bytes."""
    return REDUCTION_LAUNCH + loaded_bytes / (L2_BYTES * multiprocessors)


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
