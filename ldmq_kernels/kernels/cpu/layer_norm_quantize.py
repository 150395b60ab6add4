"""q = quantize(layer_norm(x))."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu.producers import in_dtype_of, quantize_tokens


def layer_norm_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Layer normalization over the last axis and the quantization of the result."""
    weight, bias = in_dtype_of(x, norm_weight), in_dtype_of(x, norm_bias)
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return quantize_tokens(normed, inv_scale, inv_smooth)
