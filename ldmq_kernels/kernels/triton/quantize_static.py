"""q = clamp(rint(fp32(x) * r[c]), -127, 127), x as a matrix of pixels or tokens by channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.dependent_launch import begin, dependent
from ldmq_kernels.kernels.triton.launch import as_asked, floating, on_device, quantized_dtype
from ldmq_kernels.kernels.triton.producers import elementwise_tile, factors, programs, store_quantized, tile_start


@triton.jit
def _quantize_static(
    x_ptr: tl.tensor,  # (rows, channels) floating
    factor_ptr: tl.tensor,  # (1,) or (channels,) float32
    out_ptr: tl.tensor,  # (rows, channels) int8 or FP8
    rows: tl.tensor,
    channels: tl.tensor,
    ONE_FACTOR: tl.constexpr,
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
    store_quantized(
        x, factor_ptr, out_ptr, None, row, channel, row_mask, channel_mask, channels, ONE_FACTOR, DYNAMIC=False
    )


def quantize_static(x: Tensor, inv_scale: Tensor, channel_dim: int, q_dtype: torch.dtype | None = None) -> Tensor:
    """Quantize with a calibrated scale.

    Raises:
        Unsupported: x is not float16, bfloat16 or float32, or inv_scale fits no axis.
    """
    layout = torch.channels_last if x.dim() == 4 and channel_dim == 1 else torch.contiguous_format
    x = floating(x).contiguous(memory_format=layout)
    stored = quantized_dtype(x, q_dtype)
    out = torch.empty(x.shape, dtype=stored, device=x.device, memory_format=layout)
    channels = x.shape[1] if layout == torch.channels_last else x.shape[-1] if x.dim() else 1
    keywords = factors(inv_scale, None, channels)
    if x.numel() == 0:
        return as_asked(out, q_dtype)
    rows = x.numel() // channels
    tile = elementwise_tile(rows, channels)
    with on_device(x):
        _quantize_static[(programs(rows, channels, tile),)](
            x, out_ptr=out, rows=rows, channels=channels, **keywords, **tile, **dependent(x)
        )
    return as_asked(out, q_dtype)
