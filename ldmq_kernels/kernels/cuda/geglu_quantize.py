"""q = quantize(value * gelu(gate)), in float32 up to the int8 rounding; csrc/geglu_quantize.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.cuda.producers import factors
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.operands import only_int8
from ldmq_kernels.kernels.reference.producers import no_scale


def geglu_quantize(
    x: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The gated half of a GEGLU layer and the quantization of its result.

    Args:
        x: (..., 2 C) float32, float16 or bfloat16: the values, then their gates; copied where it is not contiguous.

    Raises:
        Unsupported: FP8, another dtype, device or size of an operand, or too many channels for a scale of each row.
    """
    only_int8(q_dtype)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise Unsupported(f"x is {tuple(x.shape)}, must have values and as many gates in its last axis")
    x = x.contiguous()
    arguments = extension.source(x, torch.contiguous_format) | extension.target(x)
    channels = x.shape[-1] // 2
    arguments |= factors(inv_scale, inv_smooth, x, channels)
    q = torch.empty((*x.shape[:-1], channels), dtype=torch.int8, device=x.device)
    scale = no_scale(x) if inv_scale is not None else x.new_empty(x.shape[:-1], dtype=torch.float32)
    if q.numel() == 0:
        return q, scale
    binding = extension.binding()
    try:
        binding.geglu_quantize(
            **arguments, q=q.data_ptr(), scale=scale.data_ptr(), rows=q.numel() // channels, channels=channels
        )
    except binding.Refusal as refusal:
        raise Unsupported(str(refusal)) from None
    return q, scale
