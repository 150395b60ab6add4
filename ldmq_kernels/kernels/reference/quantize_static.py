"""q = clamp(rint(fp32(x) * r[c]), -127, 127), with r made once from the scale and the smoothing."""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_int8(y: Tensor) -> Tensor:
    """Round half to even and clamp to [-127, 127]; overwrites y, float32."""
    return y.round_().clamp_(-127, 127).to(torch.int8)


def quantize_static(x: Tensor, inv_scale: Tensor, channel_dim: int) -> Tensor:
    """Quantize with a calibrated scale.

    Args:
        x: any shape, floating; (N, C, H, W) where `channel_dim` is 1.
        inv_scale: (1,) or (C,) float32, the smoothing's reciprocal over the scale.
        channel_dim: the axis of x that `inv_scale` runs along, 1 or -1.

    Returns:
        int8 of x's shape, channels_last for a 4-D x with channels in axis 1.
    """
    if x.dim() == 4 and channel_dim == 1:
        x = x.contiguous(memory_format=torch.channels_last)
        return round_to_int8(x.float() * inv_scale.view(1, -1, 1, 1))
    return round_to_int8(x.contiguous().float() * inv_scale)
