"""out = x @ (weight * group_scale)^T + bias, in float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats.int4 import expand_groups, unpack_int4


def linear_w4a16(x: Tensor, weight: Tensor, group_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer on int4 weights with a scale for each group, and floating activations."""
    channels = x.shape[-1]
    restored = unpack_int4(weight, channels) * expand_groups(group_scale, channels)
    out = torch.nn.functional.linear(x.float(), restored)
    return (out if bias is None else out + bias.float()).to(x.dtype)
