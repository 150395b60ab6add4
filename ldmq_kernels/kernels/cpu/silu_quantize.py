"""q = quantize(silu(x))."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled_producers
from ldmq_kernels.kernels.cpu.producers import quantize_tokens


def silu_quantize(
    x: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """SiLU and the quantization of its result."""
    if compiled_producers.takes(x, q_dtype):
        return compiled_producers.activate(x, compiled_producers.SILU, inv_scale, inv_smooth)
    return quantize_tokens(torch.nn.functional.silu(x), inv_scale, inv_smooth, q_dtype)
