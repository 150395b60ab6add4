"""q = quantize(layer_norm(x) * (1 + modulation_scale) + modulation_shift)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled_producers
from ldmq_kernels.kernels.cpu.producers import in_dtype_of, quantize_tokens
from ldmq_kernels.kernels.reference.producers import modulated


def layer_norm_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    modulation_scale: Tensor | None = None,
    modulation_shift: Tensor | None = None,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Layer normalization over the last axis, its modulation where there is one, and the quantization of the result."""
    if compiled_producers.takes(x, q_dtype):
        modulation = modulation_scale, modulation_shift
        return compiled_producers.layer_norm(x, norm_weight, norm_bias, eps, inv_scale, inv_smooth, modulation)
    weight, bias = in_dtype_of(x, norm_weight), in_dtype_of(x, norm_bias)
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if modulation_scale is not None or modulation_shift is not None:
        normed = modulated(normed, modulation_scale, modulation_shift)
    return quantize_tokens(normed, inv_scale, inv_smooth, q_dtype)
