"""Facts about all elements of a large tensor in as few passes over memory as torch needs for them."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(x: Tensor) -> bool:
    """Whether no element of a floating tensor is NaN or infinite: by the least and the largest, which NaN makes NaN."""
    return not x.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def power_of(x: Tensor) -> float:
    """The sum of squares of a float32 tensor: of each row in float32, of the rows in float64."""
    return float((x * x).sum(-1).sum(dtype=torch.float64))
