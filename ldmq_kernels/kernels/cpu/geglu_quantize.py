"""q = quantize(value * gelu(gate)), GELU by the error function."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled_producers
from ldmq_kernels.kernels.cpu.producers import quantize_tokens


def geglu_quantize(
    x: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The gated half of a GEGLU layer and the quantization of its result."""
    if compiled_producers.takes(x, q_dtype):
        return compiled_producers.activate(x, compiled_producers.GEGLU, inv_scale, inv_smooth)
    value, gate = x.chunk(2, dim=-1)
    return quantize_tokens(value * torch.nn.functional.gelu(gate), inv_scale, inv_smooth, q_dtype)
