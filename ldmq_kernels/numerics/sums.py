"""Facts about all elements of a large tensor in as few passes over memory as torch needs for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1 << 20  # elements of a block: larger temporaries are new pages of memory each time


def row_blocks(x: Tensor) -> Sequence[Tensor]:
    """The rows of a tensor in blocks, views of it; all of them in one where no CPU holds it."""
    if x.device.type != "cpu" or x.numel() <= BLOCK:
        return (x,)
    return x.split(max(1, BLOCK * len(x) // x.numel()))


def absmax(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The largest absolute value over some axes, NaN where any is, without a copy of x."""
    return torch.maximum(x.amax(tuple(axes)), -x.amin(tuple(axes))) if len(axes) else x.abs()


def is_finite(x: Tensor) -> bool:
    """Whether no element of a floating tensor is NaN or infinite: by the least and the largest, which NaN makes NaN."""
    return not x.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def power_of(x: Tensor) -> float:
    """The sum of squares of a float32 tensor: of each row in float32, infinite above 3e38, of the rows in float64."""
    return float((x * x).sum(-1).sum(dtype=torch.float64))
