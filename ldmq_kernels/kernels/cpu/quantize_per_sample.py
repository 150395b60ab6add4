"""scale = max(absmax(y), floor) / 127 for each sample; q = clamp(rint(y * (1 / scale)), -127, 127)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu.blocks import as_rows, quantize_rows
from ldmq_kernels.kernels.reference.quantize_per_token import dynamic_scale


def _absmax(rows: Tensor, smoothing: Tensor | None) -> Tensor:
    """Largest absolute value of fp32(rows) * smoothing, without making the product: rounding keeps order."""
    if smoothing is None:
        lowest, highest = torch.aminmax(rows)
        return torch.maximum(highest, -lowest).float()
    return (torch.maximum(rows.amax(0), -rows.amin(0)).float() * smoothing).amax()


def quantize_per_sample(x: Tensor, smoothing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize each picture of a batch with the scale of its own largest value.

    Args:
        x: (N, C, H, W) floating.
        smoothing: (C,) float32 reciprocal smoothing vector, multiplied in first.

    Returns:
        (N, C, H, W) int8, channels_last, and the scales (N,) float32.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty(x.shape[0], dtype=torch.float32)
    if not x.numel():
        return out, scale
    for sample in range(x.shape[0]):
        rows = as_rows(x[sample : sample + 1])
        scale[sample] = dynamic_scale(_absmax(rows, smoothing))
        inverse = 1 / scale[sample : sample + 1]
        factors = (inverse,) if smoothing is None else (smoothing, inverse)
        quantize_rows(rows, factors, as_rows(out[sample : sample + 1]))
    return out, scale
