"""The low-rank correction of a quantized weight: what two thin matrices in 16 bit can give back."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.numerics.gptq import check_hessian, damped_cholesky


def low_rank_correction(
    weight: Tensor, quantized: Tensor, rank: int, hessian: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """down and up, so that quantized + up @ down is as near to the weight as this rank allows.

    Nearness is the squared error of the layer's output, tr(D H D^T) with D = weight - quantized - up @ down,
    or plainly of the weight without a hessian. The best correction projects the error onto the leading
    left singular vectors of error @ H^(1/2).

    Args:
        weight: (out, ..., K) floating; axes after the first count as one.
        quantized: what the quantized weight stands for, of the same shape.
        rank: at least 1; from min(out, K) on, the correction is exact.
        hessian: (K, K) float32, the sum of x x^T over the layer's inputs.

    Returns:
        down (rank, K) and up (out, rank), float32; up has orthonormal columns, the strongest first, then
        zeros where the rank is more than min(out, K).

    Raises:
        ValueError: the shapes differ, the rank is not positive, a weight is not finite, or the hessian does not fit.
    """
    if weight.shape != quantized.shape:
        raise ValueError(f"the weight is {tuple(weight.shape)} and its quantized form {tuple(quantized.shape)}")
    if rank < 1:
        raise ValueError(f"a low-rank correction has a rank of at least 1, got {rank}")
    error = (weight.float() - quantized.float()).flatten(1)
    if not bool(torch.isfinite(error).all()):
        raise ValueError("the weight or its quantized form holds NaN or infinite values")
    if hessian is not None:
        check_hessian(hessian, error.shape[1])
    up = _leading_directions(error, min(rank, *error.shape), hessian)
    missing = rank - up.shape[1]
    down = torch.nn.functional.pad(up.t() @ error, (0, 0, 0, missing))
    return down, torch.nn.functional.pad(up, (0, missing))


def _leading_directions(error: Tensor, rank: int, hessian: Tensor | None) -> Tensor:
    """(out, rank), orthonormal: the leading left singular vectors of error @ H^(1/2), by the smaller Gram matrix."""
    out, width = error.shape
    if out <= width:
        gram = error @ error.t() if hessian is None else error @ hessian.float() @ error.t()
        return _leading_eigenvectors(gram, rank)
    weighted = error if hessian is None else error @ damped_cholesky(hessian)
    right = _leading_eigenvectors(weighted.t() @ weighted, rank)
    return torch.linalg.qr(weighted @ right).Q


def _leading_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    return torch.linalg.eigh(symmetric.double()).eigenvectors[:, -count:].flip(1).float()
