"""q = quantize(layer_norm(x) * (1 + modulation_scale) + modulation_shift), in float32 up to the last rounding.

A row is in registers when its statistics are taken, so the variance is that of the centered values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.dependent_launch import begin, dependent
from ldmq_kernels.kernels.triton.launch import as_asked, floating, on_device
from ldmq_kernels.kernels.triton.producers import (
    channel_vector,
    factors,
    row_tile,
    runs,
    store_quantized,
    tile_start,
    token_outputs,
)


@triton.jit
def _layer_norm_quantize(
    x_ptr: tl.tensor,  # (rows, channels) floating
    weight_ptr: tl.tensor,  # (channels,) floating, or None
    bias_ptr: tl.tensor,  # (channels,) floating, or None
    modulation_scale_ptr: tl.tensor,  # (runs, channels) floating, or None
    modulation_shift_ptr: tl.tensor,  # (runs, channels) floating, or None
    factor_ptr: tl.tensor,  # (1,) or (channels,) float32, or None
    out_ptr: tl.tensor,  # (rows, channels) int8 or FP8
    scale_ptr: tl.tensor,  # (rows,) float32, or (0,) with a calibrated scale
    rows: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    scale_rows: tl.tensor,  # that share a row of the modulation's scale
    shift_rows: tl.tensor,
    ONE_FACTOR: tl.constexpr,
    DYNAMIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    first_row, first_channel = tile_start(channels, BLOCK_M, BLOCK_C)
    row, channel = tl.arange(0, BLOCK_M)[:, None], first_channel + tl.arange(0, BLOCK_C)[None, :]
    row_mask, channel_mask = first_row + row < rows, channel < channels
    pointers = x_ptr + first_row * channels + row * channels + channel
    x = tl.load(pointers, mask=row_mask & channel_mask, other=0.0).to(tl.float32)
    values = tl.cast(channels, tl.float32)
    mean = tl.div_rn(tl.sum(x, 1, keep_dims=True), values)
    centered = tl.where(channel_mask, x - mean, 0.0)
    variance = tl.div_rn(tl.sum(centered * centered, 1, keep_dims=True), values)
    y = centered * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)
    if modulation_scale_ptr is not None:
        pointers = modulation_scale_ptr + (first_row + row) // scale_rows * channels + channel
        y = y * (1.0 + tl.load(pointers, mask=row_mask & channel_mask, other=0.0).to(tl.float32))
    if modulation_shift_ptr is not None:
        pointers = modulation_shift_ptr + (first_row + row) // shift_rows * channels + channel
        y = y + tl.load(pointers, mask=row_mask & channel_mask, other=0.0).to(tl.float32)
    store_quantized(
        y,
        factor_ptr,
        out_ptr + first_row * channels,
        scale_ptr + first_row,
        row,
        channel,
        row_mask,
        channel_mask,
        channels,
        ONE_FACTOR,
        DYNAMIC,
    )


def layer_norm_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    modulation_scale: Tensor | None = None,
    modulation_shift: Tensor | None = None,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Layer normalization over the last axis, its modulation where there is one, and the quantization of the result.

    Raises:
        Unsupported: x is not float16, bfloat16 or float32, or C is above 16384, or the rows of a modulation
            do not divide x's.
    """
    x = floating(x).contiguous()
    channels = x.shape[-1]
    q, scale = token_outputs(x, channels, inv_scale, q_dtype)
    if q.numel() == 0:
        return as_asked(q, q_dtype), scale
    rows = q.numel() // channels
    scales, scale_rows = runs(modulation_scale, rows, channels)
    shifts, shift_rows = runs(modulation_shift, rows, channels)
    with on_device(x):
        _layer_norm_quantize[(rows,)](
            x,
            channel_vector(norm_weight, channels),
            channel_vector(norm_bias, channels),
            scales,
            shifts,
            out_ptr=q,
            scale_ptr=scale,
            rows=rows,
            channels=channels,
            eps=eps,
            scale_rows=scale_rows,
            shift_rows=shift_rows,
            DYNAMIC=inv_scale is None,
            **factors(inv_scale, inv_smooth, channels),
            **row_tile(channels),
            **dependent(x),
        )
    return as_asked(q, q_dtype), scale
