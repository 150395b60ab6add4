"""scale = max(absmax(y), floor) / 127 for each sample; q = clamp(rint(y * (1 / scale)), -127, 127).

Two launches: the largest value of each of a sample's parts, then quantization, in which every program
reduces the parts of its sample again. No atomics, so the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.dependent_launch import begin, dependent
from ldmq_kernels.kernels.triton.hadamard import rotate
from ldmq_kernels.kernels.triton.launch import as_asked, floating, on_device, quantized_dtype
from ldmq_kernels.kernels.triton.producers import factors, scaled, store_quantized
from ldmq_kernels.kernels.triton.rounding import magnitude_bits
from ldmq_kernels.kernels.triton.samples import (
    STAGES,
    part_of_program,
    parts_of_samples,
    sample_scale,
    sample_tile,
    sample_tile_start,
)


@triton.jit
def _part_maximum(
    x_ptr: tl.tensor,  # (samples, pixels, channels) floating
    factor_ptr: tl.tensor,  # (channels,) float32, or None
    maximum_ptr: tl.tensor,  # (samples, parts, column blocks) float32
    pixels: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    part_pixels: tl.tensor,
    ONE_FACTOR: tl.constexpr,
    ROTATED: tl.constexpr,  # channels that are rotated together; 1 rotates nothing
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    sample, first, last, first_channel = part_of_program(pixels, channels, parts, part_pixels, BLOCK_C)
    row, channel = tl.arange(0, BLOCK_M)[:, None], first_channel + tl.arange(0, BLOCK_C)[None, :]
    channel_mask = channel < channels
    offset = row * channels + channel
    largest = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        mask = (start + row < last) & channel_mask
        x = tl.load(x_ptr + (sample * pixels + start) * channels + offset, mask=mask, other=0.0).to(tl.float32)
        y = rotate(scaled(x, factor_ptr, channel, channel_mask, ONE_FACTOR), channel, BLOCK_M, BLOCK_C, ROTATED)
        largest = tl.maximum(largest, magnitude_bits(y))
    tl.store(maximum_ptr + tl.program_id(0), tl.max(tl.max(largest, 1), 0).to(tl.float32, bitcast=True))


@triton.jit
def _quantize_samples(
    x_ptr: tl.tensor,  # (samples, pixels, channels) floating
    factor_ptr: tl.tensor,  # (channels,) float32, or None
    maximum_ptr: tl.tensor,  # (samples, maxima) float32
    out_ptr: tl.tensor,  # (samples, pixels, channels) int8 or FP8
    scale_ptr: tl.tensor,  # (samples,) float32
    pixels: tl.tensor,
    channels: tl.tensor,
    maxima: tl.tensor,
    ONE_FACTOR: tl.constexpr,
    ROTATED: tl.constexpr,  # channels that are rotated together; 1 rotates nothing
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    sample, first, first_channel = sample_tile_start(pixels, channels, BLOCK_M, BLOCK_C)
    row, channel = tl.arange(0, BLOCK_M)[:, None], first_channel + tl.arange(0, BLOCK_C)[None, :]
    row_mask, channel_mask = first + row < pixels, channel < channels
    start = (sample * pixels + first) * channels
    mask = row_mask & channel_mask
    x = tl.load(x_ptr + start + row * channels + channel, mask=mask, other=0.0).to(tl.float32)
    y = rotate(scaled(x, factor_ptr, channel, channel_mask, ONE_FACTOR), channel, BLOCK_M, BLOCK_C, ROTATED)
    y = y * tl.div_rn(1.0, sample_scale(maximum_ptr, scale_ptr, sample, maxima, out_ptr.dtype.element_ty))
    store_quantized(y, None, out_ptr + start, None, row, channel, row_mask, channel_mask, channels, False, False)


def quantize_per_sample(
    x: Tensor, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize each picture of a batch with the scale of its own largest value.

    Raises:
        Unsupported: x is not float16, bfloat16 or float32.
    """
    return quantize_pictures(x, inv_smooth, 1, q_dtype)


def quantize_pictures(
    x: Tensor, inv_smooth: Tensor | None, rotated: int, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The same with the channels rotated in blocks of `rotated`."""
    x = floating(x).contiguous(memory_format=torch.channels_last)
    samples, channels, height, width = x.shape
    stored = quantized_dtype(x, q_dtype)
    out = torch.empty(x.shape, dtype=stored, device=x.device, memory_format=torch.channels_last)
    scale = torch.empty(samples, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return as_asked(out, q_dtype), scale
    pixels = height * width
    factor = factors(None, inv_smooth, channels)
    parts = parts_of_samples(samples, pixels, channels)
    if rotated > 1:  # sums of pairs hold a tile twice in registers
        parts.tile["BLOCK_M"] = max(1, parts.tile["BLOCK_M"] // 2)
    tile, programs = sample_tile(samples, pixels, channels)
    maxima = torch.empty((samples, parts.count * parts.column_blocks), dtype=torch.float32, device=x.device)
    with on_device(x):
        _part_maximum[(maxima.numel(),)](
            x,
            maximum_ptr=maxima,
            pixels=pixels,
            channels=channels,
            parts=parts.count,
            part_pixels=parts.pixels,
            ROTATED=rotated,
            **factor,
            **parts.tile,
            **dependent(x),
        )
        _quantize_samples[(programs,)](
            x,
            maximum_ptr=maxima,
            out_ptr=out,
            scale_ptr=scale,
            pixels=pixels,
            channels=channels,
            maxima=maxima.shape[1],
            ROTATED=rotated,
            **factor,
            **tile,
            **dependent(x),
        )
    return as_asked(out, q_dtype), scale
