"""out = (x @ weight^T) * weight_scale + bias, in float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_w8a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer on int8 weights and floating activations."""
    out = torch.nn.functional.linear(x.float(), weight.float()) * weight_scale
    return (out if bias is None else out + bias.float()).to(x.dtype)
