"""scale = max(absmax(y), floor) / 127 for each sample; q = clamp(rint(y * (1 / scale)), -127, 127).

In FP8 448 takes the place of 127, and e4m3's values that of the integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.geometry import check_channels
from ldmq_kernels.kernels.reference.quantize_per_token import dynamic_scale
from ldmq_kernels.kernels.reference.quantize_static import rounded_to


def quantize_per_sample(
    x: Tensor, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize each picture of a batch with the scale of its own largest value."""
    check_channels(x.shape[1], inv_smooth)
    y = x.contiguous(memory_format=torch.channels_last).float()
    if inv_smooth is not None:
        y = y * inv_smooth.view(1, -1, 1, 1)
    scale = dynamic_scale(y.abs().amax((1, 2, 3)), q_dtype) if y.numel() else y.new_empty(y.shape[0])
    return rounded_to(y * (1 / scale).view(-1, 1, 1, 1), q_dtype), scale
