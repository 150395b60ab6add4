"""q = clamp(rint(fp32(x) * r[c]), -127, 127), x as a matrix of pixels or tokens by channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.triton.launch import floating, on_device
from ldmq_kernels.kernels.triton.rounding import block_shape, round_to_int8


@triton.jit
def _quantize_static(
    x_ptr: tl.tensor,  # (rows, channels) floating
    reciprocal_ptr: tl.tensor,  # (1,) or (channels,) float32
    out_ptr: tl.tensor,  # (rows, channels) int8
    rows: tl.tensor,
    channels: tl.tensor,
    ONE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    offset = row[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if ONE_SCALE:
        y = x * tl.load(reciprocal_ptr)
    else:
        y = x * tl.load(reciprocal_ptr + channel, mask=channel < channels, other=0.0)[None, :]
    tl.store(out_ptr + offset, round_to_int8(y), mask=mask)


def quantize_static(x: Tensor, reciprocal: Tensor, channel_dim: int) -> Tensor:
    """Quantize with a calibrated scale.

    Args:
        x: any shape, floating; (N, C, H, W) where `channel_dim` is 1.
        reciprocal: (1,) or (C,) float32, the smoothing's reciprocal over the scale.
        channel_dim: the axis of x that `reciprocal` runs along, 1 or -1.

    Returns:
        int8 of x's shape, channels_last for a 4-D x with channels in axis 1.

    Raises:
        Unsupported: x is not float16, bfloat16 or float32, or the reciprocal fits no axis.
    """
    layout = torch.channels_last if x.dim() == 4 and channel_dim == 1 else torch.contiguous_format
    x = floating(x).contiguous(memory_format=layout)
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device, memory_format=layout)
    channels = x.shape[1] if layout == torch.channels_last else x.shape[-1] if x.dim() else 1
    if reciprocal.numel() not in (1, channels):
        raise Unsupported(f"{reciprocal.numel()} reciprocals for {channels} channels")
    if x.numel() == 0:
        return out
    rows = x.numel() // channels
    block_m, block_c = block_shape(channels)
    with on_device(x):
        _quantize_static[(triton.cdiv(rows, block_m), triton.cdiv(channels, block_c))](
            x,
            reciprocal.contiguous(),
            out,
            rows,
            channels,
            ONE_SCALE=reciprocal.numel() == 1,
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            enable_fp_fusion=False,
        )
    return out
