"""q = quantize(silu(x)), in float32 up to the last rounding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.dependent_launch import begin, dependent
from ldmq_kernels.kernels.triton.launch import as_asked, floating, on_device
from ldmq_kernels.kernels.triton.producers import (
    elementwise_tile,
    factors,
    programs,
    row_tile,
    silu,
    store_quantized,
    tile_start,
    token_outputs,
)


@triton.jit
def _silu_quantize(
    x_ptr: tl.tensor,  # (rows, channels) floating
    factor_ptr: tl.tensor,  # (1,) or (channels,) float32, or None
    out_ptr: tl.tensor,  # (rows, channels) int8 or FP8
    scale_ptr: tl.tensor,  # (rows,) float32, or (0,) with a calibrated scale
    rows: tl.tensor,
    channels: tl.tensor,
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
    store_quantized(
        silu(x),
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


def silu_quantize(
    x: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """SiLU and the quantization of its result.

    Raises:
        Unsupported: x is not float16, bfloat16 or float32, or C is above 16384 and the scale measured.
    """
    x = floating(x).contiguous()
    channels = x.shape[-1]
    q, scale = token_outputs(x, channels, inv_scale, q_dtype)
    if q.numel() == 0:
        return as_asked(q, q_dtype), scale
    rows = q.numel() // channels
    tile = row_tile(channels) if inv_scale is None else elementwise_tile(rows, channels)
    keywords = factors(inv_scale, inv_smooth, channels) | tile
    with on_device(x):
        _silu_quantize[(programs(rows, channels, tile),)](
            x,
            out_ptr=q,
            scale_ptr=scale,
            rows=rows,
            channels=channels,
            DYNAMIC=inv_scale is None,
            **keywords,
            **dependent(x),
        )
    return as_asked(q, q_dtype), scale
