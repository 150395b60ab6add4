"""Kernels of a group normalization over (samples, pixels, channels): statistics, and what follows them.

The mean and the sum of squared distances from it (M2) are taken value by value as by Welford, and merged as by
Chan, Golub and LeVeque (1983): never as a difference of two large sums. A group is a run of GROUP channels,
seldom a power of two, so parts keep the statistics of every channel and the merge puts them together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ldmq_kernels.kernels.reference.group_norm_silu_quantize import SILU_DIP as _SILU_DIP
from ldmq_kernels.kernels.reference.group_norm_silu_quantize import SILU_DIP_AT as _SILU_DIP_AT
from ldmq_kernels.kernels.triton.dependent_launch import begin
from ldmq_kernels.kernels.triton.producers import silu, store_quantized
from ldmq_kernels.kernels.triton.rounding import absolute_maximum
from ldmq_kernels.kernels.triton.samples import STAGES, part_of_program, sample_scale, sample_tile_start

SILU_DIP_AT, SILU_DIP = tl.constexpr(_SILU_DIP_AT), tl.constexpr(_SILU_DIP)


@triton.jit
def _add_values(
    mean: tl.tensor, m2: tl.tensor, x: tl.tensor, mask: tl.tensor, step: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Welford's update of every element's mean and M2 by its value of this step, counted from zero."""
    delta = tl.where(mask, x - mean, 0.0)
    mean = tl.fma(delta, tl.div_rn(1.0, tl.cast(step + 1, tl.float32)), mean)
    return mean, tl.fma(delta, x - mean, m2)


@triton.jit
def partial_statistics(
    x_ptr: tl.tensor,  # (samples, pixels, channels) floating
    statistics_ptr: tl.tensor,  # (samples, parts, 2 or 4, channels) float32: mean, M2, least and largest value
    pixels: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    part_pixels: tl.tensor,
    EXTREMES: tl.constexpr,  # whether the last two are computed
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Statistics of every channel over a part of a sample's pixels."""
    begin(DEPENDENT)
    sample, first, last, first_channel = part_of_program(pixels, channels, parts, part_pixels, BLOCK_C)
    row, channel = tl.arange(0, BLOCK_M)[:, None], first_channel + tl.arange(0, BLOCK_C)[None, :]
    channel_mask = channel < channels
    offset = row * channels + channel
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    least = tl.full((BLOCK_M, BLOCK_C), float("inf"), tl.float32)
    largest = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        mask = (start + row < last) & channel_mask
        x = tl.load(x_ptr + (sample * pixels + start) * channels + offset, mask=mask, other=0.0).to(tl.float32)
        mean, m2 = _add_values(mean, m2, x, mask, (start - first) // BLOCK_M)
        if EXTREMES:
            least = tl.minimum(least, tl.where(mask, x, float("inf")))
            largest = tl.maximum(largest, tl.where(mask, x, float("-inf")))
    count = ((last - first - row + BLOCK_M - 1) // BLOCK_M).to(tl.float32)  # values in each row of the block
    part_mean = tl.div_rn(tl.sum(mean * count, 0, keep_dims=True), (last - first).to(tl.float32))
    distance = mean - part_mean
    part_m2 = tl.sum(tl.fma(count * distance, distance, m2), 0, keep_dims=True)
    part = tl.program_id(0) // tl.cdiv(channels, BLOCK_C)
    statistics_ptr += part.to(tl.int64) * ((4 if EXTREMES else 2) * channels) + channel
    tl.store(statistics_ptr, part_mean, mask=channel_mask)
    tl.store(statistics_ptr + channels, part_m2, mask=channel_mask)
    if EXTREMES:
        tl.store(statistics_ptr + 2 * channels, tl.min(least, 0, keep_dims=True), mask=channel_mask)
        tl.store(statistics_ptr + 3 * channels, tl.max(largest, 0, keep_dims=True), mask=channel_mask)


@triton.jit
def _affine(
    variance: tl.tensor,
    eps: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    channel: tl.tensor,
    channel_mask: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """What x - mean is multiplied by, and what is added to it, by channel."""
    multiplier = tl.zeros(channel.shape, tl.float32) + tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    if weight_ptr is not None:
        multiplier = multiplier * tl.load(weight_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)
    shift = tl.zeros(channel.shape, tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)
    return multiplier, shift


@triton.jit
def _store_group(
    mean: tl.tensor,  # one float32
    multiplier: tl.tensor,  # (1, BLOCK_G) float32
    shift: tl.tensor,  # (1, BLOCK_G) float32
    least: tl.tensor,  # (1, BLOCK_G) float32, of x
    largest: tl.tensor,
    inv_smooth_ptr: tl.tensor,  # (channels,) float32, or None
    normalization_ptr: tl.tensor,  # (samples, 2, channels) float32: mean, multiplier
    bound_ptr: tl.tensor,  # (samples, groups) float32, or None
    sample: tl.tensor,
    channel: tl.tensor,
    channel_mask: tl.tensor,
    channels: tl.tensor,
    SILU: tl.constexpr,
) -> None:
    """Store how a group is normalized, and the largest value that its channels' extremes allow."""
    normalization_ptr += sample * 2 * channels + channel
    tl.store(normalization_ptr, tl.zeros(channel.shape, tl.float32) + mean, mask=channel_mask)
    tl.store(normalization_ptr + channels, multiplier, mask=channel_mask)
    if bound_ptr is not None:
        low, high = tl.fma(least - mean, multiplier, shift), tl.fma(largest - mean, multiplier, shift)
        low, high = tl.minimum(low, high), tl.maximum(low, high)
        if SILU:
            bound = tl.maximum(tl.abs(silu(low)), tl.abs(silu(high)), propagate_nan=tl.PropagateNan.ALL)
            bound = tl.where((low < SILU_DIP_AT) & (high > SILU_DIP_AT) & (bound < SILU_DIP), SILU_DIP, bound)
        else:
            bound = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL)
        if inv_smooth_ptr is not None:
            bound = bound * tl.load(inv_smooth_ptr + channel, mask=channel_mask, other=0.0)
        tl.store(bound_ptr + tl.program_id(0), tl.max(absolute_maximum(tl.where(channel_mask, bound, 0.0), 1), 0))


@triton.jit
def merge_statistics(
    statistics_ptr: tl.tensor,  # (samples, parts, 2 or 4, channels) float32: mean, M2, least and largest value
    weight_ptr: tl.tensor,  # (channels,) floating, or None
    bias_ptr: tl.tensor,  # (channels,) floating, or None
    inv_smooth_ptr: tl.tensor,  # (channels,) float32, or None
    normalization_ptr: tl.tensor,  # (samples, 2, channels) float32: mean, multiplier
    bound_ptr: tl.tensor,  # (samples, groups) float32, or None where there are no extremes
    pixels: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    part_pixels: tl.tensor,
    eps: tl.tensor,
    group: tl.tensor,  # its channels
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """The statistics of a group of a sample from those of its channels in all parts."""
    begin(DEPENDENT)
    sample = (tl.program_id(0) // (channels // group)).to(tl.int64)
    lane = tl.arange(0, BLOCK_G)[None, :]
    channel, channel_mask = (tl.program_id(0) % (channels // group)) * group + lane, lane < group
    part = tl.arange(0, BLOCK_P)[:, None]
    stride = (2 if bound_ptr is None else 4) * channels
    pointers = statistics_ptr + sample * parts * stride + part * stride + channel
    total = tl.zeros((BLOCK_P, BLOCK_G), tl.float32)
    for start in range(0, parts, BLOCK_P):
        mask = (start + part < parts) & channel_mask
        count = tl.minimum(part_pixels, pixels - (start + part) * part_pixels).to(tl.float32)
        total += count * tl.load(pointers + start * stride, mask=mask, other=0.0)
    values = tl.cast(pixels, tl.float32) * group
    mean = tl.div_rn(tl.sum(tl.sum(total, 1), 0), values)
    m2 = tl.zeros((BLOCK_P, BLOCK_G), tl.float32)
    least = tl.full((BLOCK_P, BLOCK_G), float("inf"), tl.float32)
    largest = tl.full((BLOCK_P, BLOCK_G), float("-inf"), tl.float32)
    for start in range(0, parts, BLOCK_P):
        mask = (start + part < parts) & channel_mask
        count = tl.minimum(part_pixels, pixels - (start + part) * part_pixels).to(tl.float32)
        distance = tl.load(pointers + start * stride, mask=mask, other=0.0) - mean
        part_m2 = tl.load(pointers + start * stride + channels, mask=mask, other=0.0)
        m2 += tl.where(mask, tl.fma(count * distance, distance, part_m2), 0.0)
        if bound_ptr is not None:
            least = tl.minimum(least, tl.load(pointers + start * stride + 2 * channels, mask=mask, other=float("inf")))
            high = tl.load(pointers + start * stride + 3 * channels, mask=mask, other=float("-inf"))
            largest = tl.maximum(largest, high)
    variance = tl.div_rn(tl.sum(tl.sum(m2, 1), 0), values)
    multiplier, shift = _affine(variance, eps, weight_ptr, bias_ptr, channel, channel_mask)
    _store_group(
        mean,
        multiplier,
        shift,
        tl.min(least, 0, keep_dims=True),
        tl.max(largest, 0, keep_dims=True),
        inv_smooth_ptr,
        normalization_ptr,
        bound_ptr,
        sample,
        channel,
        channel_mask,
        channels,
        SILU,
    )


@triton.jit
def normalize(
    x_ptr: tl.tensor,  # (samples, pixels, channels) floating
    normalization_ptr: tl.tensor,  # (samples, 2, channels) float32: mean, multiplier
    bias_ptr: tl.tensor,  # (channels,) floating, or None
    factor_ptr: tl.tensor,  # (1,) or (channels,) float32, or None
    bound_ptr: tl.tensor,  # (samples, groups) float32 for a scale of each sample, or None
    out_ptr: tl.tensor,  # (samples, pixels, channels) int8 or FP8
    scale_ptr: tl.tensor,  # (samples,), (samples, pixels) or (0,) float32
    pixels: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    SILU: tl.constexpr,
    ONE_FACTOR: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Normalize, apply SiLU, quantize."""
    begin(DEPENDENT)
    sample, first, first_channel = sample_tile_start(pixels, channels, BLOCK_M, BLOCK_C)
    row, channel = tl.arange(0, BLOCK_M)[:, None], first_channel + tl.arange(0, BLOCK_C)[None, :]
    row_mask, channel_mask = first + row < pixels, channel < channels
    start = (sample * pixels + first) * channels
    x = tl.load(x_ptr + start + row * channels + channel, mask=row_mask & channel_mask, other=0.0).to(tl.float32)
    normalization_ptr += sample * 2 * channels + channel
    mean = tl.load(normalization_ptr, mask=channel_mask, other=0.0)
    multiplier = tl.load(normalization_ptr + channels, mask=channel_mask, other=0.0)
    shift = tl.zeros((1, BLOCK_C), tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)
    y = tl.fma(x - mean, multiplier, shift)
    if SILU:
        y = silu(y)
    if bound_ptr is not None:
        if factor_ptr is not None:
            y = y * tl.load(factor_ptr + channel, mask=channel_mask, other=0.0)
        y = y * tl.div_rn(1.0, sample_scale(bound_ptr, scale_ptr, sample, groups, out_ptr.dtype.element_ty))
        factor_ptr = None
    store_quantized(
        y,
        factor_ptr,
        out_ptr + start,
        scale_ptr + sample * pixels + first,
        row,
        channel,
        row_mask,
        channel_mask,
        channels,
        ONE_FACTOR,
        PER_TOKEN,
    )


@triton.jit
def group_norm_slab(
    x_ptr: tl.tensor,  # (samples, pixels, channels) floating
    weight_ptr: tl.tensor,  # (channels,) floating, or None
    bias_ptr: tl.tensor,  # (channels,) floating, or None
    factor_ptr: tl.tensor,  # (1,) or (channels,) float32, or None
    out_ptr: tl.tensor,  # (samples, pixels, channels) int8 or FP8, or None where another launch quantizes
    normalization_ptr: tl.tensor,  # (samples, 2, channels) float32: mean, multiplier; or None
    bound_ptr: tl.tensor,  # (samples, groups) float32, or None
    pixels: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    SILU: tl.constexpr,
    ONE_FACTOR: tl.constexpr,
    GROUP: tl.constexpr,  # the channels of a group
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,  # not below GROUP
    DEPENDENT: tl.constexpr,
) -> None:
    """A whole group of a sample, read twice: quantized at once, or its statistics for the next launch."""
    begin(DEPENDENT)
    groups = channels // GROUP
    sample = (tl.program_id(0) // groups).to(tl.int64)
    pixel, lane = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_G)[None, :]
    channel, channel_mask = (tl.program_id(0) % groups) * GROUP + lane, lane < GROUP
    x_ptr += sample * pixels * channels
    offset = pixel * channels + channel
    mean = tl.zeros((BLOCK_P, BLOCK_G), tl.float32)
    m2 = tl.zeros((BLOCK_P, BLOCK_G), tl.float32)
    least = tl.full((BLOCK_P, BLOCK_G), float("inf"), tl.float32)
    largest = tl.full((BLOCK_P, BLOCK_G), float("-inf"), tl.float32)
    for start in range(0, pixels, BLOCK_P):
        mask = (start + pixel < pixels) & channel_mask
        x = tl.load(x_ptr + start * channels + offset, mask=mask, other=0.0).to(tl.float32)
        mean, m2 = _add_values(mean, m2, x, mask, start // BLOCK_P)
        if bound_ptr is not None:
            least = tl.minimum(least, tl.where(mask, x, float("inf")))
            largest = tl.maximum(largest, tl.where(mask, x, float("-inf")))
    count = tl.where(channel_mask, ((pixels - pixel + BLOCK_P - 1) // BLOCK_P).to(tl.float32), 0.0)
    values = tl.cast(pixels, tl.float32) * GROUP
    group_mean = tl.div_rn(tl.sum(tl.sum(count * mean, 1), 0), values)
    distance = mean - group_mean
    variance = tl.div_rn(tl.sum(tl.sum(tl.fma(count * distance, distance, m2), 1), 0), values)
    multiplier, shift = _affine(variance, eps, weight_ptr, bias_ptr, channel, channel_mask)
    if out_ptr is not None:
        out_ptr += sample * pixels * channels
        for start in range(0, pixels, BLOCK_P):
            pixel_mask = start + pixel < pixels
            mask = pixel_mask & channel_mask
            x = tl.load(x_ptr + start * channels + offset, mask=mask, other=0.0).to(tl.float32)
            y = tl.fma(x - group_mean, multiplier, shift)
            if SILU:
                y = silu(y)
            tile_ptr = out_ptr + start * channels
            store_quantized(
                y, factor_ptr, tile_ptr, None, pixel, channel, pixel_mask, channel_mask, channels, ONE_FACTOR, False
            )
    else:
        _store_group(
            group_mean,
            multiplier,
            shift,
            tl.min(least, 0, keep_dims=True),
            tl.max(largest, 0, keep_dims=True),
            factor_ptr,
            normalization_ptr,
            bound_ptr,
            sample,
            channel,
            channel_mask,
            channels,
            SILU,
        )
