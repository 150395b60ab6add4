"""GPTQ: rounds a weight so that the error of each input is made up for by the inputs rounded after it.

The error to be small is tr((W - Q) H (W - Q)^T) with H the sum of x x^T over a layer's inputs. With
the inputs in the order of rounding and H = V V^T, V upper triangular, the error is ||(W - Q) V||^2,
and column j of (W - Q) V needs columns 0..j of the error alone: each column is rounded to the value
that makes its own term smallest. That is GPTQ's result without the inverse of H, which its authors
form: Frantar et al., GPTQ, arXiv 2210.17323; Chen et al., The Geometry of LLM Quantization, arXiv 2507.18553.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldmq_kernels.numerics.kronecker import KroneckerHessian, round_both_ways
from ldmq_kernels.numerics.sums import is_finite

Hessian = Tensor | KroneckerHessian
Nearest = Callable[[Tensor], Tensor]

BLOCK = 128  # columns whose errors reach the later columns by one matrix product
DAMPING = 0.01  # of the mean diagonal, added to it
DOUBLE_UP_TO = 2048  # width up to which the factor is computed in float64


def check_hessian(hessian: Tensor, width: int, of: str = "inputs") -> None:
    """Refuse a matrix that is not the second moments of `width` inputs, or outputs.

    Raises:
        ValueError: it is not (width, width), holds NaN or infinite values, or has a negative diagonal.
    """
    if hessian.shape != (width, width):
        raise ValueError(
            f"the hessian is {tuple(hessian.shape)}, but the weight has {width} {of}: ({width}, {width}) is "
            "needed, recorded at this layer's own input"
        )
    if not is_finite(hessian):
        raise ValueError(
            "the hessian holds NaN or infinite values: record the layer's inputs again, with a model in float32 "
            "if float16 overflows"
        )
    if bool((hessian.diagonal() < 0).any()):
        raise ValueError("the hessian has a negative diagonal: it must be a sum of x x^T")


def damped_cholesky(hessian: Tensor) -> Tensor:
    """The lower triangular L with L L^T = hessian / mean diagonal + damping * I, of the least damping that has one.

    Args:
        hessian: (K, K) floating, symmetric, no negative eigenvalues but for rounding.

    Returns:
        (K, K) float32; the identity for a hessian of zeros.

    Raises:
        ValueError: the hessian is far from positive semidefinite.
    """
    width = hessian.shape[0]
    mean = hessian.diagonal().mean()
    if not bool(mean > 0):
        return torch.eye(width, dtype=torch.float32, device=hessian.device)
    scaled = hessian.to(torch.float64 if width <= DOUBLE_UP_TO else torch.float32) / mean
    damping = added = DAMPING
    while damping <= 1:
        scaled.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if not bool(failed):
            return factor.float()
        damping, added = damping * 10, damping * 9
    raise ValueError("the hessian is not positive semidefinite: it must be a sum of x x^T, in float32 at least")


@dataclass(frozen=True)
class RoundingOrder:
    """How the error of one input is made up for by others, the inputs of most power rounded first.

    Attributes:
        order: (K,) int64, the inputs from the last to be rounded to the first.
        reach: (K, K) float32, lower triangular in that order with ones on its diagonal: what an error of an
            input moves the target of each later one by.
        importance: (K,) float32, positive, with mean 1, by input: what its rounding error counts squared, the
            part of its power that inputs of less power do not share. It replaces the diagonal of the hessian,
            which counts errors that later inputs make up for.
        outputs: the same of the outputs, of a `KroneckerHessian`; None where each output is rounded for itself.
    """

    order: Tensor
    reach: Tensor
    importance: Tensor
    outputs: RoundingOrder | None = None


def rounding_order(hessian: Hessian, width: int, outputs: int = 0) -> RoundingOrder:
    """Factorize the Hessian of a layer of `width` inputs, of `outputs` where it counts them.

    Raises:
        ValueError: the hessian has another size, is not finite, or is not a sum of x x^T.
    """
    if isinstance(hessian, KroneckerHessian):
        check_hessian(hessian.outputs, outputs, "outputs")
        return replace(rounding_order(hessian.inputs, width), outputs=rounding_order(hessian.outputs, outputs))
    check_hessian(hessian, width)
    order = torch.argsort(hessian.diagonal(), stable=True)
    factor = damped_cholesky(hessian[order[:, None], order])
    diagonal = factor.diagonal().clone()
    importance = torch.empty_like(diagonal)
    importance[order] = diagonal.square() / diagonal.square().mean()
    return RoundingOrder(order, factor.div_(diagonal), importance)


def integers_up_to(largest: int) -> Nearest:
    """The integers in [-largest, largest], as the grid of `gptq_round`."""
    return lambda values: values.round_().clamp_(-largest, largest)


def gptq_round(weight: Tensor, steps: Tensor, nearest: Nearest, inputs: RoundingOrder) -> Tensor:
    """Points of a given grid for a weight.

    An input that is always zero, or shares nothing with others, is rounded to nearest.

    Args:
        weight: (out, K) float32.
        steps: (out, K) float32, positive: the unit of the grid at each place.
        nearest: the grid point next to each value, in these units; may overwrite them.

    Returns:
        (out, K) float32, grid points, so that points * steps is near the weight.
    """
    order, reach = inputs.order, inputs.reach
    if inputs.outputs is not None:
        rows = inputs.outputs.order
        place = rows[:, None], order
        points = torch.empty_like(weight)
        points[place] = round_both_ways(weight[place], steps[place], nearest, reach, inputs.outputs.reach)
        return points
    columns, steps = weight.t()[order], steps.t()[order]
    points, error = torch.empty_like(columns), torch.empty_like(columns)
    for end in range(len(order), 0, -BLOCK):
        start = max(0, end - BLOCK)
        target = torch.addmm(columns[start:end], reach[end:, start:end].t(), error[end:])
        for column in range(end - 1, start - 1, -1):
            points[column] = nearest(target[column - start] / steps[column])
            error[column] = columns[column] - points[column] * steps[column]
            target[: column - start].addr_(reach[column, start:column], error[column])
    rounded = torch.empty_like(weight)
    rounded[:, order] = points.t()
    return rounded
