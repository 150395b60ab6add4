"""An activation as a pair of int8 values, the second one for what the first one's rounding leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats.int8 import INT8_MAX

LOW_STEPS = 2 * INT8_MAX  # steps of the second value in one of the first: a remainder is half a step at most


def quantize_low_part(x: Tensor, high: Tensor, inv_scale: Tensor, axis: int) -> Tensor:
    """The second value of each pair: x = (high + low / LOW_STEPS) / inv_scale, to 16 bits.

    Args:
        x: floating.
        high: int8, as x: the rounded x * inv_scale, as `quantize_static` gives it.
        inv_scale: (1,) or (C,) float32.
        axis: of the channels.

    Returns:
        int8, as x.
    """
    shape = [1] * x.dim()
    shape[axis] = -1
    remainder = torch.addcmul(-high.float(), x.float(), inv_scale.view(shape))
    return remainder.mul_(LOW_STEPS).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
