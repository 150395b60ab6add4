"""q = quantize(gelu(x))."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled_producers
from ldmq_kernels.kernels.cpu.producers import quantize_tokens


def gelu_quantize(
    x: Tensor, tanh: bool, inv_scale: Tensor | None, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """GELU and the quantization of its result."""
    if compiled_producers.takes(x, q_dtype):
        gelu = compiled_producers.GELU_TANH if tanh else compiled_producers.GELU
        return compiled_producers.activate(x, gelu, inv_scale, inv_smooth)
    y = torch.nn.functional.gelu(x, approximate="tanh" if tanh else "none")
    return quantize_tokens(y, inv_scale, inv_smooth, q_dtype)
