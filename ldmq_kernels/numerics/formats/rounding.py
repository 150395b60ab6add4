"""Rounding a weight to a symmetric integer grid: to nearest or, where the layer's inputs are known, as GPTQ does."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.numerics.gptq import Hessian, Nearest, RoundingOrder, gptq_round, integers_up_to, rounding_order
from ldmq_kernels.numerics.sums import is_finite, row_blocks

SMALLEST_SCALE = 1e-30  # of an all-zero channel, whose integers are all zero


def check_finite(weight: Tensor) -> None:
    """Refuse a weight that holds NaN or infinite values, by a ValueError."""
    if not is_finite(weight):
        raise ValueError("the weight holds NaN or infinite values, which cannot be quantized")


def per_channel(scale: Tensor, weight: Tensor) -> Tensor:
    """(out,) as (out, 1, ..., 1), to be broadcast over a weight (out, ..., C)."""
    return scale.view(-1, *[1] * (weight.dim() - 1))


def order_of(weight: Tensor, hessian: Hessian | None) -> RoundingOrder | None:
    """In what order GPTQ rounds the inputs of a weight (out, ..., C), and maybe its outputs; None without a hessian."""
    return None if hessian is None else rounding_order(hessian, weight[0].numel(), len(weight))


def rounded(weight: Tensor, steps: Tensor, largest: int, inputs: RoundingOrder | None) -> Tensor:
    """The int8 integers of a weight on the grid of steps: to nearest or, where the inputs are known, as GPTQ does."""
    nearest = integers_up_to(largest)
    if inputs is not None or len(steps) != len(weight):
        return rounded_on_grid(weight, steps, nearest, inputs).to(torch.int8)
    out, blocks = torch.empty_like(weight, dtype=torch.int8), row_blocks(weight)
    for rows, of_rows, integers in zip(blocks, steps.split(len(blocks[0])), row_blocks(out), strict=True):
        integers.copy_(rounded_on_grid(rows, of_rows, nearest, None))
    return out


def rounded_on_grid(weight: Tensor, steps: Tensor, nearest: Nearest, inputs: RoundingOrder | None) -> Tensor:
    """The grid points of a weight in units of its steps, float32, rounded as `rounded` does.

    Args:
        weight: (out, ..., C) float32.
        steps: float32, positive, that broadcasts to the weight.
        nearest: the grid point next to each value; may overwrite them.
        inputs: for GPTQ.
    """
    if inputs is None:
        return nearest(weight / steps)
    flat_steps = steps.expand_as(weight).flatten(1)
    return gptq_round(weight.flatten(1), flat_steps, nearest, inputs).view_as(weight)


def not_positive(scale: Tensor) -> tuple[Tensor, str]:
    """Where a scale or its inverse is not finite and positive, and that this is what is accepted."""
    return ~(torch.isfinite(scale) & torch.isfinite(1 / scale) & (scale > 0)), "finite and positive"
