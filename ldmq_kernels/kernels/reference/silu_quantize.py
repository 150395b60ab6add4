"""q = quantize(silu(x)), in float32 up to the int8 rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.reference.producers import quantize_tokens


def silu_quantize(x: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """SiLU and the quantization of its result.

    Args:
        x: (..., C) floating.
        inv_scale: (1,) or (C,) float32, the smoothing's reciprocal over a calibrated scale; None measures the scale.
        inv_smooth: (C,) float32 reciprocal smoothing vector, multiplied in where the scale is measured.

    Returns:
        (..., C) int8 and the scales (...) float32, or (0,) with a `inv_scale`.
    """
    return quantize_tokens(torch.nn.functional.silu(x.float()), inv_scale, inv_smooth)
