"""q = quantize(gelu(x)), in float32 up to the last rounding; GELU by the error function, or by tanh."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.reference.producers import quantize_tokens


def gelu_quantize(
    x: Tensor, tanh: bool, inv_scale: Tensor | None, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """GELU and the quantization of its result."""
    y = torch.nn.functional.gelu(x.float(), approximate="tanh" if tanh else "none")
    return quantize_tokens(y, inv_scale, inv_smooth, q_dtype)
