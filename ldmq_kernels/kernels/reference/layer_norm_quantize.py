"""q = quantize(layer_norm(x) * (1 + modulation_scale) + modulation_shift), in float32 up to the last rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.reference.producers import modulated, quantize_tokens


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
    weight, bias = (None if v is None else v.float() for v in (norm_weight, norm_bias))
    normed = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    normed = modulated(normed, modulation_scale, modulation_shift)
    return quantize_tokens(normed, inv_scale, inv_smooth, q_dtype)
