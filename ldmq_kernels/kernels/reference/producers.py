"""What the producers share: the quantization at their end."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.reference.quantize_per_token import quantize_per_token
from ldmq_kernels.kernels.reference.quantize_static import quantize_static


def no_scale(like: Tensor) -> Tensor:
    """The second result of a producer with a calibrated scale: (0,) float32."""
    return torch.empty(0, dtype=torch.float32, device=like.device)


def quantize_tokens(
    y: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None, q_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(..., C) with a calibrated scale, or with each token's own."""
    if inv_scale is not None:
        return quantize_static(y, inv_scale, -1, q_dtype), no_scale(y)
    return quantize_per_token(y, inv_smooth, q_dtype)


def in_runs(y: Tensor, terms: Tensor) -> Tensor:
    """y (..., C) as one run of rows for each of the terms (runs, 1, C); no row at all is a run of any number."""
    rows = y.numel() // max(1, y.shape[-1])
    return y.reshape(len(terms), rows // max(1, len(terms)), y.shape[-1])


def modulated(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """y * (1 + scale) + shift in float32, where there are such: (..., C) each, one row for an equal run of y's."""
    rows = [None if term is None else term.float().reshape(-1, 1, term.shape[-1]) for term in (scale, shift)]
    for term, is_factor in zip(rows, (True, False), strict=True):
        if term is not None:
            runs = in_runs(y, term)
            y = (runs * (1 + term) if is_factor else runs + term).reshape(y.shape)
    return y
