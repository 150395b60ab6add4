"""q = quantize(silu(group_norm(x))), in float32 up to the last rounding.

The scale of a sample comes from the extremes of each channel before SiLU, so that one pass over memory
finds the statistics and the extremes, and a second one quantizes: it is the largest value that SiLU takes
between them, which is the largest absolute value itself unless all of the sample lies in SiLU's dip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.operands import eight_bit
from ldmq_kernels.kernels.reference.producers import no_scale, quantize_tokens
from ldmq_kernels.kernels.reference.quantize_per_token import dynamic_scale
from ldmq_kernels.kernels.reference.quantize_static import rounded_to

SILU_DIP_AT, SILU_DIP = -1.2784645, 0.27846456  # where SiLU is least, and how far below zero


def group_norm_silu_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    per_token: bool,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Group normalization, SiLU where asked for, and the quantization of the result."""
    weight, bias = (None if v is None else v.float() for v in (norm_weight, norm_bias))
    normed = torch.nn.functional.group_norm(x.float(), num_groups, weight, bias, eps)
    pixels = (torch.nn.functional.silu(normed) if silu else normed).permute(0, 2, 3, 1).contiguous()
    if per_token or inv_scale is not None:
        q, scale = quantize_tokens(pixels, inv_scale, inv_smooth, q_dtype)
        return q.permute(0, 3, 1, 2), scale
    if not x.numel():
        return pixels.to(eight_bit(q_dtype)).permute(0, 3, 1, 2), no_scale(x).new_empty(x.shape[0])
    factor = torch.ones_like(normed[0, :, 0, 0]) if inv_smooth is None else inv_smooth
    lowest, highest = normed.amin((2, 3)), normed.amax((2, 3))  # (N, C)
    bound = torch.maximum(_at(lowest, silu).abs(), _at(highest, silu).abs())
    if silu:
        has_dip = (lowest < SILU_DIP_AT) & (highest > SILU_DIP_AT)
        bound = torch.where(has_dip, bound.clamp_min(SILU_DIP), bound)
    scale = dynamic_scale((bound * factor).amax(1), q_dtype)
    return rounded_to(pixels * factor * (1 / scale).view(-1, 1, 1, 1), q_dtype).permute(0, 3, 1, 2), scale


def _at(values: Tensor, silu: bool) -> Tensor:
    return torch.nn.functional.silu(values) if silu else values
