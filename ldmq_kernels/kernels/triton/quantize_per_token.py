"""scale = max(absmax(y), floor) / 127 for each token; q = clamp(rint(y * (1 / scale)), -127, 127)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.dependent_launch import begin, dependent
from ldmq_kernels.kernels.triton.hadamard import rotate
from ldmq_kernels.kernels.triton.launch import as_asked, floating, on_device, quantized_dtype
from ldmq_kernels.kernels.triton.producers import factors, row_tile, scaled, store_quantized, tile_start


@triton.jit
def _quantize_per_token(
    x_ptr: tl.tensor,  # (rows, channels) floating
    factor_ptr: tl.tensor,  # (channels,) float32, or None
    out_ptr: tl.tensor,  # (rows, channels) int8 or FP8
    scale_ptr: tl.tensor,  # (rows,) float32
    rows: tl.tensor,
    channels: tl.tensor,
    ONE_FACTOR: tl.constexpr,
    ROTATED: tl.constexpr,  # channels that are rotated together; 1 rotates nothing
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
    out_ptr += first_row * channels
    scale_ptr += first_row
    y = rotate(scaled(x, factor_ptr, channel, channel_mask, ONE_FACTOR), channel, BLOCK_M, BLOCK_C, ROTATED)
    store_quantized(y, None, out_ptr, scale_ptr, row, channel, row_mask, channel_mask, channels, False, DYNAMIC=True)


def quantize_per_token(
    x: Tensor, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize each row with the scale of its own largest value.

    Raises:
        Unsupported: x is not float16, bfloat16 or float32, or K is above 16384.
    """
    return quantize_rows(x, inv_smooth, 1, q_dtype)


def quantize_rows(
    x: Tensor, inv_smooth: Tensor | None, rotated: int, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The same with the channels rotated in blocks of `rotated`."""
    x = floating(x).contiguous()
    channels = x.shape[-1]
    out = torch.empty(x.shape, dtype=quantized_dtype(x, q_dtype), device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return as_asked(out, q_dtype), scale
    rows = scale.numel()
    with on_device(x):
        _quantize_per_token[(rows,)](
            x,
            out_ptr=out,
            scale_ptr=scale,
            rows=rows,
            channels=channels,
            ROTATED=rotated,
            **factors(None, inv_smooth, channels),
            **row_tile(channels),
            **dependent(x),
        )
    return as_asked(out, q_dtype), scale
