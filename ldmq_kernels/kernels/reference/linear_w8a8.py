"""out = ((x_q @ weight^T) * x_scale * weight_scale + bias) * gate + residual, the product in exact integers."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.reference.producers import in_runs


def linear_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear layer on int8 activations and int8 weights."""
    # float64 holds sums of int8 products exactly, and every device multiplies it
    accumulator = torch.nn.functional.linear(x_q.double(), weight.double()).float()
    out = accumulator * (x_scale if x_scale.numel() == 1 else x_scale.unsqueeze(-1)) * weight_scale
    if bias is not None:
        out = out + bias.float()
    if gate is not None:
        rows = gate.reshape(-1, 1, gate.shape[-1])
        out = (in_runs(out, rows) * rows.float()).reshape(out.shape)
    if residual is not None:
        out = out + residual.float()
    return out.to(out_dtype)
