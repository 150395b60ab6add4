"""q = clamp(rint(fp32(x) * r[c]), -127, 127), in csrc/quantize.cu; in FP8 448 takes the place of 127."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.dispatch import Unsupported


def quantize_static(x: Tensor, inv_scale: Tensor, channel_dim: int, q_dtype: torch.dtype | None = None) -> Tensor:
    """Quantize with a calibrated scale.

    Args:
        x: float32, float16 or bfloat16; (N, C, H, W) channels_last with `channel_dim` 1, or (..., C) contiguous.

    Raises:
        Unsupported: another dtype, layout or device, or FP8 for a GPU that has none.
    """
    is_image = x.dim() == 4 and channel_dim == 1
    if x.dim() == 0 or not (is_image or channel_dim % x.dim() == x.dim() - 1):
        raise Unsupported(f"channel_dim is {channel_dim} of {x.dim()} axes, must be the last, or 1 of (N, C, H, W)")
    memory_format = torch.channels_last if is_image else torch.contiguous_format
    arguments = extension.source(x, memory_format) | extension.dependent_target(x)
    stored = extension.quantized(x, q_dtype)
    channels = x.shape[channel_dim]
    extension.check_factors(inv_scale, "inv_scale", x, channels)
    q = torch.empty(x.shape, dtype=stored, device=x.device, memory_format=memory_format)
    extension.binding().quantize_static(
        **arguments,
        inv_scale=inv_scale.data_ptr(),
        inv_scale_count=inv_scale.numel(),
        **extension.stored_in(q),
        rows=x.numel() // max(channels, 1),
        channels=channels,
    )
    return q
