"""What is measured over whole samples: the parts that they are split into, and the scale of each.

Parts are reduced in one launch and put together in the next, always in the same order, with no atomics: the
result is the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ldmq_kernels.kernels.triton.producers import CHANNELS, elementwise_tile, programs
from ldmq_kernels.kernels.triton.rounding import dynamic_scale, magnitude_bits

PART_PROGRAMS = 2 * 132  # two for each multiprocessor of an H100 or H200: what their registers hold at once
PART_ELEMENTS = 4096  # of one step of a part: 16 to a thread, since accumulators of their number stay in registers
LANES = tl.constexpr(512)  # of the reduction of a sample's maxima
STAGES = tl.constexpr(4)  # of a loop over a part: loads on the way while one step is worked on


@dataclass(frozen=True)
class Parts:
    """How the pixels of each sample are split, and the tile that runs over a part."""

    count: int
    pixels: int  # of every part but the last
    column_blocks: int
    tile: dict[str, Any]


def parts_of_samples(samples: int, pixels: int, channels: int) -> Parts:
    """How many parts a sample is cut into: as many as run at once, where there is work for them."""
    block_c = min(CHANNELS, triton.next_power_of_2(channels))
    block_m = min(PART_ELEMENTS // block_c, triton.next_power_of_2(pixels))
    column_blocks, blocks = triton.cdiv(channels, block_c), triton.cdiv(pixels, block_m)
    part_pixels = block_m * triton.cdiv(blocks, max(1, PART_PROGRAMS // (samples * column_blocks)))
    tile = {"BLOCK_M": block_m, "BLOCK_C": block_c, "num_warps": 8, "enable_fp_fusion": False}
    return Parts(triton.cdiv(pixels, part_pixels), part_pixels, column_blocks, tile)


def sample_tile(samples: int, pixels: int, channels: int) -> tuple[dict[str, Any], int]:
    """Launch options for elementwise tiles that each lie within a sample, and their number."""
    tile = elementwise_tile(samples * pixels, channels)
    return within_samples(tile, samples, pixels, channels)


def within_samples(tile: dict[str, Any], samples: int, pixels: int, channels: int) -> tuple[dict[str, Any], int]:
    """A tile no higher than a sample, and how many of them cover all samples."""
    tile = tile | {"BLOCK_M": min(tile["BLOCK_M"], triton.next_power_of_2(pixels))}
    return tile, samples * programs(pixels, channels, tile)


@triton.jit
def part_of_program(
    pixels: tl.tensor, channels: tl.tensor, parts: tl.tensor, part_pixels: tl.tensor, BLOCK_C: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Sample (int64), first pixel, the one after the last, and first channel of this program's part."""
    column_blocks = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // column_blocks
    first = (part % parts) * part_pixels
    last = tl.minimum(first + part_pixels, pixels)
    return (part // parts).to(tl.int64), first, last, (tl.program_id(0) % column_blocks) * BLOCK_C


@triton.jit
def sample_tile_start(
    pixels: tl.tensor, channels: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Sample (int64), first pixel and first channel of this program's tile, which lies within a sample."""
    column_blocks, pixel_blocks = tl.cdiv(channels, BLOCK_C), tl.cdiv(pixels, BLOCK_M)
    block = tl.program_id(0) // column_blocks
    first_channel = (tl.program_id(0) % column_blocks) * BLOCK_C
    return (block // pixel_blocks).to(tl.int64), (block % pixel_blocks) * BLOCK_M, first_channel


@triton.jit
def sample_scale(
    maximum_ptr: tl.tensor,  # (samples, maxima) float32, not negative
    scale_ptr: tl.tensor,  # (samples,) float32
    sample: tl.tensor,
    maxima: tl.tensor,
    OUT: tl.constexpr,
) -> tl.tensor:
    """The scale of a sample from the maxima of its parts; stored too, the same value by every program."""
    index = tl.arange(0, LANES)
    largest = tl.zeros((LANES,), tl.int32)
    for start in range(0, maxima, LANES):
        values = tl.load(maximum_ptr + sample * maxima + start + index, mask=start + index < maxima, other=0.0)
        largest = tl.maximum(largest, magnitude_bits(values))
    scale = dynamic_scale(tl.max(largest, 0).to(tl.float32, bitcast=True), OUT)
    tl.store(scale_ptr + sample, scale)
    return scale
