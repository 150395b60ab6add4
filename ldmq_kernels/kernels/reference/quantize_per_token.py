"""scale = max(absmax(y), floor) / 127 for each token; q = clamp(rint(y * (1 / scale)), -127, 127).

In FP8 448 takes the place of 127, and e4m3's values that of the integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.geometry import check_channels
from ldmq_kernels.kernels.reference.quantize_static import rounded_to
from ldmq_kernels.numerics.formats.float8 import FLOAT8, FLOAT8_MAX

ABSMAX_FLOOR = 1e-12  # of a token that is all zero, so that its scale is positive


def dynamic_scale(absmax: Tensor, q_dtype: torch.dtype | None = None) -> Tensor:
    """The scale for values up to `absmax`, float32."""
    largest = FLOAT8_MAX if q_dtype == FLOAT8 else 127
    return absmax.clamp_min(ABSMAX_FLOOR) / absmax.new_tensor(largest)  # a GPU multiplies by 1 / 127 for a plain 127


def quantize_per_token(
    x: Tensor, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize each row with the scale of its own largest value."""
    check_channels(x.shape[-1], inv_smooth)
    y = x.contiguous().float()
    if inv_smooth is not None:
        y = y * inv_smooth
    scale = dynamic_scale(y.abs().amax(-1), q_dtype) if y.numel() else y.new_empty(y.shape[:-1])
    return rounded_to(y * (1 / scale).unsqueeze(-1), q_dtype), scale
