"""q = quantize(silu(group_norm(x)))."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled_producers
from ldmq_kernels.kernels.cpu.producers import in_dtype_of, quantize_tokens
from ldmq_kernels.kernels.cpu.quantize_per_sample import quantize_per_sample


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
    """Group normalization, SiLU where asked for, and the quantization of the result.

    In torch the scale of a sample is its largest absolute value, which the definition's bound is too, unless all of
    the sample lies in SiLU's dip.
    """
    if compiled_producers.takes(x, q_dtype):
        norm = norm_weight, norm_bias, num_groups, eps
        return compiled_producers.group_norm(x, *norm, silu, inv_scale, inv_smooth, per_token)
    weight, bias = in_dtype_of(x, norm_weight), in_dtype_of(x, norm_bias)
    y = torch.nn.functional.group_norm(x, num_groups, weight, bias, eps)
    y = torch.nn.functional.silu(y) if silu else y
    if per_token or inv_scale is not None:
        q, scale = quantize_tokens(y.permute(0, 2, 3, 1), inv_scale, inv_smooth, q_dtype)
        return q.permute(0, 3, 1, 2), scale
    return quantize_per_sample(y, inv_smooth, q_dtype)
