"""q = quantize(gelu(x))."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu.producers import quantize_tokens


def gelu_quantize(
    x: Tensor, tanh: bool, inv_scale: Tensor | None, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """GELU and the quantization of its result."""
    y = torch.nn.functional.gelu(x, approximate="tanh" if tanh else "none")
    return quantize_tokens(y, inv_scale, inv_smooth, q_dtype)
