"""scale = max(absmax(y), floor) / 127 for each token; q = clamp(rint(y * (1 / scale)), -127, 127)."""

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


@triton.jit
def _quantize_per_token(
    x_ptr: tl.tensor,  # (rows, channels) floating
    smoothing_ptr: tl.tensor,  # (channels,) float32, or None
    out_ptr: tl.tensor,  # (rows, channels) int8
    scale_ptr: tl.tensor,  # (rows,) float32
    rows: tl.tensor,
    channels: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    absmax = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (channel < channels)[None, :]
        y = tl.load(x_ptr + row[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if smoothing_ptr is not None:
            y = y * tl.load(smoothing_ptr + channel, mask=channel < channels, other=0.0)[None, :]
        absmax = running_maximum(absmax, absolute_maximum(y, 1))
    scale = dynamic_scale(absmax)
    tl.store(scale_ptr + row, scale, mask=row_mask)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, channels, BLOCK_C):  # the second reading comes from the cache
        channel = start + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (channel < channels)[None, :]
        offset = row[:, None] * channels + channel[None, :]
        y = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if smoothing_ptr is not None:
            y = y * tl.load(smoothing_ptr + channel, mask=channel < channels, other=0.0)[None, :]
        tl.store(out_ptr + offset, round_to_int8(y * inverse[:, None]), mask=mask)


def quantize_per_token(x: Tensor, smoothing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize each row with the scale of its own largest value.

    Args:
        x: (..., K) floating.
        smoothing: (K,) float32 reciprocal smoothing vector, multiplied in first.

    Returns:
        (..., K) int8 and the scales (...) float32.

    Raises:
        Unsupported: x is not float16, bfloat16 or float32.
    """
    x = floating(x).contiguous()
    channels = x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return out, scale
    rows = scale.numel()
    block_m, block_c = block_shape(channels)
    with on_device(x):
        _quantize_per_token[(triton.cdiv(rows, block_m),)](
            x,
            expanded(smoothing, (channels,)),
            out,
            scale,
            rows,
            channels,
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            enable_fp_fusion=False,
        )
    return out, scale
