"""What the producers share: the quantization at their end."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.reference.quantize_per_token import quantize_per_token
from ldmq_kernels.kernels.reference.quantize_static import quantize_static


def no_scale(like: Tensor) -> Tensor:
    """The second result of a producer with a calibrated scale: (0,) float32."""
    return torch.empty(0, dtype=torch.float32, device=like.device)


def quantize_tokens(y: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """(..., C) with a calibrated scale, or with each token's own."""
    if inv_scale is not None:
        return quantize_static(y, inv_scale, -1), no_scale(y)
    return quantize_per_token(y, inv_smooth)
