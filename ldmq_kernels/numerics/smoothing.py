"""SmoothQuant's per-channel migration of activation outliers into the weight, in the consumer alone.

The layer computes (x / s) @ (w * s): its weight carries s, its quantization multiplies by 1 / s.
Source: Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ldmq_kernels.numerics.gptq import Hessian
from ldmq_kernels.numerics.hadamard import rotated_hessian
from ldmq_kernels.numerics.kronecker import KroneckerHessian
from ldmq_kernels.numerics.sums import absmax

LARGEST_RATIO = 1e4  # a dead channel must not be scaled into the overflow of another one


def weight_absmax(weight: Tensor) -> Tensor:
    """(C,) float32, the largest absolute value of each input channel of a weight (out, ..., C) floating."""
    return absmax(weight, range(weight.dim() - 1)).float()


def smoothing_vector(input_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """s = absmax(x)^alpha / absmax(w)^(1 - alpha) for each input channel, as powers of two.

    Powers of two make weight * s and x / s exact, so smoothing itself adds no rounding.

    Args:
        input_absmax: (C,) largest absolute value of each input channel.
        weight_absmax: (C,) float32, see the function of this name.
        alpha: 0 leaves activations as they are, 1 moves all of their range into the weight.

    Returns:
        (C,) float32, positive, with geometric mean near 1.
    """
    alive = (input_absmax > 0) & (weight_absmax > 0)
    x = torch.where(alive, input_absmax.float(), torch.ones_like(weight_absmax))
    w = torch.where(alive, weight_absmax, torch.ones_like(weight_absmax))
    logarithm = torch.log2(x) * alpha - torch.log2(w) * (1 - alpha)
    logarithm = torch.where(alive, logarithm - logarithm[alive].mean() if bool(alive.any()) else logarithm, 0.0)
    bound = torch.log2(torch.tensor(LARGEST_RATIO, dtype=torch.float32, device=logarithm.device))
    return torch.exp2(torch.round(logarithm.clamp(-bound, bound)))


def parts_vector(input_absmax: Tensor, first: int) -> Tensor:
    """One factor for each of two parts of the channels, a power of two that brings their ranges together.

    Args:
        input_absmax: (C,) largest absolute value of each input channel.
        first: channels of the first part.

    Returns:
        (C,) float32: the part of the larger range is divided by its factor, the other has 1.
    """
    largest = torch.stack([part.amax() for part in input_absmax.float().tensor_split([first])])
    alive = bool((largest > 0).all())
    exponents = torch.log2(largest / largest.amin()).round().clamp_max(math.log2(LARGEST_RATIO))
    factors = torch.exp2(exponents) if alive else torch.ones_like(largest)
    return factors.repeat_interleave(torch.tensor([first, input_absmax.numel() - first], device=factors.device))


def smoothed_hessian(hessian: Tensor, inv_scale: Tensor) -> Tensor:
    """The Hessian (K, K) of a layer whose input is smoothed; the reciprocal (C,) holds at each position of a kernel."""
    factors = inv_scale.to(hessian.device).repeat(hessian.shape[0] // inv_scale.numel())
    return (hessian * factors[:, None]).mul_(factors)


def fitted(
    weight: Tensor, hessian: Hessian | None, inv_smooth: Tensor | None, rotated: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Hessian | None]:
    """A weight (out, ..., C) and a Hessian for inputs that are smoothed, then rotated, and then rounded.

    Args:
        rotated: `hadamard.rotated_weight`, or what gives the same faster; None where nothing is rotated.
    """
    if isinstance(hessian, KroneckerHessian):
        weight, inputs = fitted(weight, hessian.inputs, inv_smooth, rotated)
        assert isinstance(inputs, Tensor)
        return weight, replace(hessian, inputs=inputs)
    if inv_smooth is not None:
        weight = weight.float() / inv_smooth
        hessian = None if hessian is None else smoothed_hessian(hessian, inv_smooth)
    if rotated is not None:
        weight = rotated(weight.float())
        hessian = None if hessian is None else rotated_hessian(hessian, weight.shape[-1])
    return weight, hessian
