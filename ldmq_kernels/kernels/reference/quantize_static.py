"""q = clamp(rint(fp32(x) * r[c]), -127, 127), with r made once from the scale and the smoothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.geometry import check_channels


def round_to_int8(y: Tensor) -> Tensor:
    """Round half to even and clamp to [-127, 127]; overwrites y, float32."""
    return y.round_().clamp_(-127, 127).to(torch.int8)


def quantize_static(x: Tensor, inv_scale: Tensor, channel_dim: int) -> Tensor:
    """Quantize with a calibrated scale."""
    check_channels(x.shape[channel_dim] if x.dim() else 1, inv_scale)
    if x.dim() == 4 and channel_dim == 1:
        x = x.contiguous(memory_format=torch.channels_last)
        return round_to_int8(x.float() * inv_scale.view(1, -1, 1, 1))
    return round_to_int8(x.contiguous().float() * inv_scale)
