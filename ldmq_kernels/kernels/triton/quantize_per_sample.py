"""scale = max(absmax(y), floor) / 127 for each sample; q = clamp(rint(y * (1 / scale)), -127, 127).

Two launches: the largest value of each of a sample's parts, then quantization, in which every program
reduces the parts of its sample again. No atomics, so the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.launch import expanded, floating, on_device
from ldmq_kernels.kernels.triton.rounding import (
    absolute_maximum,
    block_shape,
    dynamic_scale,
    round_to_int8,
    running_maximum,
)

MOST_PARTS = 128


@triton.jit
def _load(
    x_ptr: tl.tensor,
    smoothing_ptr: tl.tensor,
    offset: tl.tensor,
    channel: tl.tensor,
    pixel_mask: tl.tensor,
    channels: tl.tensor,
) -> tl.tensor:
    mask = pixel_mask[:, None] & (channel < channels)[None, :]
    y = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if smoothing_ptr is not None:
        y = y * tl.load(smoothing_ptr + channel, mask=channel < channels, other=0.0)[None, :]
    return y


@triton.jit
def _part_maximum(
    x_ptr: tl.tensor,  # (samples, pixels, channels) floating
    smoothing_ptr: tl.tensor,  # (channels,) float32, or None
    maximum_ptr: tl.tensor,  # (samples, parts) float32
    pixels: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    part_pixels: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    first = (program % parts) * part_pixels
    base = (program // parts).to(tl.int64) * pixels
    absmax = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, part_pixels, BLOCK_M):
        pixel = first + start + tl.arange(0, BLOCK_M)
        for block in range(0, channels, BLOCK_C):
            channel = block + tl.arange(0, BLOCK_C)
            offset = (base + pixel)[:, None] * channels + channel[None, :]
            y = _load(x_ptr, smoothing_ptr, offset, channel, pixel < pixels, channels)
            absmax = running_maximum(absmax, absolute_maximum(y, 1))
    tl.store(maximum_ptr + program, absolute_maximum(absmax, 0))


@triton.jit
def _quantize_samples(
    x_ptr: tl.tensor,  # (samples, pixels, channels) floating
    smoothing_ptr: tl.tensor,  # (channels,) float32, or None
    maximum_ptr: tl.tensor,  # (samples, parts) float32
    out_ptr: tl.tensor,  # (samples, pixels, channels) int8
    scale_ptr: tl.tensor,  # (samples,) float32
    pixels: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    PARTS: tl.constexpr,  # a power of two, not below `parts`
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    blocks = tl.cdiv(pixels, BLOCK_M)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.arange(0, PARTS)
    maxima = tl.load(maximum_ptr + sample * parts + part, mask=part < parts, other=0.0)
    scale = dynamic_scale(absolute_maximum(maxima, 0))
    tl.store(scale_ptr + sample, scale)  # the same value from every program of the sample
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offset = (sample * pixels + pixel)[:, None] * channels + channel[None, :]
    y = _load(x_ptr, smoothing_ptr, offset, channel, pixel < pixels, channels)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    tl.store(out_ptr + offset, round_to_int8(y * tl.div_rn(1.0, scale)), mask=mask)


def quantize_per_sample(x: Tensor, smoothing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize each picture of a batch with the scale of its own largest value.

    Args:
        x: (N, C, H, W) floating.
        smoothing: (C,) float32 reciprocal smoothing vector, multiplied in first.

    Returns:
        (N, C, H, W) int8, channels_last, and the scales (N,) float32.

    Raises:
        Unsupported: x is not float16, bfloat16 or float32.
    """
    x = floating(x).contiguous(memory_format=torch.channels_last)
    samples, channels, height, width = x.shape
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device, memory_format=torch.channels_last)
    scale = torch.empty(samples, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return out, scale
    pixels = height * width
    block_m, block_c = block_shape(channels)
    part_pixels = block_m * triton.cdiv(triton.cdiv(pixels, block_m), MOST_PARTS)
    parts = triton.cdiv(pixels, part_pixels)
    maxima = torch.empty((samples, parts), dtype=torch.float32, device=x.device)
    smoothing = expanded(smoothing, (channels,))
    blocks = {"BLOCK_M": block_m, "BLOCK_C": block_c}
    with on_device(x):
        _part_maximum[(samples * parts,)](
            x, smoothing, maxima, pixels, channels, parts, part_pixels, **blocks, enable_fp_fusion=False
        )
        _quantize_samples[(samples * triton.cdiv(pixels, block_m), triton.cdiv(channels, block_c))](
            x,
            smoothing,
            maxima,
            out,
            scale,
            pixels,
            channels,
            parts,
            PARTS=triton.next_power_of_2(parts),
            **blocks,
            enable_fp_fusion=False,
        )
    return out, scale
