"""q = quantize(silu(x)), in float32 up to the last rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.reference.producers import quantize_tokens


def silu_quantize(
    x: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """SiLU and the quantization of its result."""
    return quantize_tokens(torch.nn.functional.silu(x.float()), inv_scale, inv_smooth, q_dtype)
