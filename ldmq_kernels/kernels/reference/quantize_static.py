"""q = clamp(rint(fp32(x) * r[c]), -127, 127), with r made once from the scale and the smoothing.

In FP8 the clamp is to [-448, 448], before the rounding to e4m3, half to even.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldmq_kernels.kernels.geometry import check_channels
from ldmq_kernels.kernels.operands import eight_bit
from ldmq_kernels.numerics.formats.float8 import FLOAT8, round_to_float8


def round_to_int8(y: Tensor) -> Tensor:
    """Round half to even and clamp to [-127, 127]; overwrites y, float32."""
    return y.round_().clamp_(-127, 127).to(torch.int8)


def rounded_to(y: Tensor, q_dtype: torch.dtype | None) -> Tensor:
    """Round and clamp to int8, without a dtype, or to FP8; overwrites y, float32."""
    return round_to_float8(y) if eight_bit(q_dtype) == FLOAT8 else round_to_int8(y)


def nan_error() -> ValueError:
    """What a calibrated scale says of NaN."""
    return ValueError(
        "the input of a layer with a calibrated scale holds NaN, which int8 does not have: "
        "ldmq.guard(model) names the layer that is the first to get it"
    )


def refuse_nan(rounded: Tensor) -> None:
    """Refuse NaN on a CPU: int8 has none, and no calibrated scale shows it. A GPU would have to be waited for.

    Args:
        rounded: float32, clamped, so that its sum is NaN for this reason alone.

    Raises:
        ValueError: there is NaN among the values.
    """
    if rounded.is_cpu and math.isnan(float(rounded.sum())):
        raise nan_error()


def _round_static(y: Tensor, q_dtype: torch.dtype | None) -> Tensor:
    if eight_bit(q_dtype) == FLOAT8:  # which has NaN, and hands it on
        return round_to_float8(y)
    y.round_().clamp_(-127, 127)
    refuse_nan(y)
    return y.to(torch.int8)


def quantize_static(x: Tensor, inv_scale: Tensor, channel_dim: int, q_dtype: torch.dtype | None = None) -> Tensor:
    """Quantize with a calibrated scale."""
    check_channels(x.shape[channel_dim] if x.dim() else 1, inv_scale)
    if x.dim() == 4 and channel_dim == 1:
        x = x.contiguous(memory_format=torch.channels_last)
        return _round_static(x.float() * inv_scale.view(1, -1, 1, 1), q_dtype)
    return _round_static(x.contiguous().float() * inv_scale, q_dtype)
