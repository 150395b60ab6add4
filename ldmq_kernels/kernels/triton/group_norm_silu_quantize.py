"""q = quantize(silu(group_norm(x))), in float32 up to the last rounding.

Memory is read twice, for the statistics and for the quantization; the second time a UNet's maps come from a cache.
Where a group of a sample is small, one program does all of it in one launch, or two with a measured scale. Otherwise
three launches: statistics of parts, a small one that merges them, and the quantization.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.reference.producers import no_scale
from ldmq_kernels.kernels.triton.dependent_launch import dependent
from ldmq_kernels.kernels.triton.group_norm import group_norm_slab, merge_statistics, normalize, partial_statistics
from ldmq_kernels.kernels.triton.launch import as_asked, floating, on_device, quantized_dtype
from ldmq_kernels.kernels.triton.producers import channel_vector, factors, row_tile
from ldmq_kernels.kernels.triton.samples import parts_of_samples, sample_tile, within_samples

SLAB_ELEMENTS = 32768  # of a group that one program reads: in 16 bits it stays in the L1 cache
SLAB_STEP = 8192  # of one step of it: 16 to a thread
MERGE_ELEMENTS = 1024  # of one step of the merge: 8 to a thread


def group_norm_silu_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    per_token: bool,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Group normalization, SiLU where asked for, and the quantization of the result.

    Raises:
        Unsupported: x is not float16, bfloat16 or float32, the groups do not divide the channels, or there are more
            than 16384 channels and a scale for each pixel.
    """
    x = floating(x).contiguous(memory_format=torch.channels_last)
    samples, channels, height, width = x.shape
    if num_groups < 1 or channels % num_groups:
        raise Unsupported(f"{num_groups} groups for {channels} channels")
    per_token = per_token and inv_scale is None
    stored = quantized_dtype(x, q_dtype)
    q = torch.empty(x.shape, dtype=stored, device=x.device, memory_format=torch.channels_last)
    if inv_scale is not None:
        scale = no_scale(x)
    else:
        scale = x.new_empty((samples, height, width) if per_token else (samples,), dtype=torch.float32)
    if x.numel() == 0:
        return as_asked(q, q_dtype), scale
    pixels, group = height * width, channels // num_groups
    norm = {"weight_ptr": channel_vector(norm_weight, channels), "bias_ptr": channel_vector(norm_bias, channels)}
    factor = factors(inv_scale, inv_smooth, channels)
    is_slab = triton.next_power_of_2(group) * pixels <= SLAB_ELEMENTS
    with on_device(x):
        if is_slab and inv_scale is not None:
            _launch_slabs(x, norm, factor, q, None, None, num_groups, eps, silu)
            return as_asked(q, q_dtype), scale
        bounds = None
        if inv_scale is None and not per_token:
            bounds = x.new_empty((samples, num_groups), dtype=torch.float32)
        normalization = x.new_empty((samples, 2, channels), dtype=torch.float32)
        if is_slab:
            _launch_slabs(x, norm, factor, None, normalization, bounds, num_groups, eps, silu)
        else:
            _launch_statistics(x, norm, factor["factor_ptr"], normalization, bounds, num_groups, eps, silu)
        if per_token:
            tile, programs = within_samples(row_tile(channels), samples, pixels, channels)
        else:
            tile, programs = sample_tile(samples, pixels, channels)
        normalize[(programs,)](
            x,
            normalization,
            norm["bias_ptr"],
            bound_ptr=bounds,
            out_ptr=q,
            scale_ptr=scale,
            pixels=pixels,
            channels=channels,
            groups=num_groups,
            SILU=silu,
            PER_TOKEN=per_token,
            **factor,
            **tile,
            **dependent(x),
        )
    return as_asked(q, q_dtype), scale


def _launch_slabs(
    x: Tensor,
    norm: dict[str, Any],
    factor: dict[str, Any],
    q: Tensor | None,
    normalization: Tensor | None,
    bounds: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> None:
    """One program for each group of each sample: fills q, or the normalization and the bounds."""
    samples, channels, height, width = x.shape
    pixels, group = height * width, channels // num_groups
    block_g = triton.next_power_of_2(group)
    block_p = min(triton.next_power_of_2(pixels), SLAB_STEP // block_g)
    group_norm_slab[(samples * num_groups,)](
        x,
        out_ptr=q,
        normalization_ptr=normalization,
        bound_ptr=bounds,
        pixels=pixels,
        channels=channels,
        eps=eps,
        SILU=silu,
        GROUP=group,
        BLOCK_P=block_p,
        BLOCK_G=block_g,
        num_warps=max(4, block_p * block_g // 512),
        enable_fp_fusion=False,
        **norm,
        **factor,
        **dependent(x),
    )


def _launch_statistics(
    x: Tensor,
    norm: dict[str, Any],
    inv_smooth: Tensor | None,
    normalization: Tensor,
    bounds: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> None:
    """Statistics of parts and their merge: fills the normalization and the bounds."""
    samples, channels, height, width = x.shape
    pixels = height * width
    parts = parts_of_samples(samples, pixels, channels)
    extent = {"pixels": pixels, "channels": channels, "parts": parts.count, "part_pixels": parts.pixels}
    statistics = x.new_empty((samples, parts.count, 2 if bounds is None else 4, channels), dtype=torch.float32)
    partial_statistics[(samples * parts.count * parts.column_blocks,)](
        x, statistics, EXTREMES=bounds is not None, **extent, **parts.tile, **dependent(x)
    )
    group = channels // num_groups
    block_g = triton.next_power_of_2(group)
    merge_statistics[(samples * num_groups,)](
        statistics,
        inv_smooth_ptr=None if bounds is None else inv_smooth,
        normalization_ptr=normalization,
        bound_ptr=bounds,
        eps=eps,
        group=group,
        SILU=silu,
        BLOCK_P=max(1, MERGE_ELEMENTS // block_g),
        BLOCK_G=block_g,
        num_warps=4,
        enable_fp_fusion=False,
        **norm,
        **extent,
        **dependent(x),
    )
