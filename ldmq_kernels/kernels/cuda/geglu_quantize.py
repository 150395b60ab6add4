"""q = quantize(value * gelu(gate)), in float32 up to the last rounding; csrc/gelu_quantize.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import producers
from ldmq_kernels.kernels.dispatch import Unsupported


def geglu_quantize(
    x: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The gated half of a GEGLU layer and the quantization of its result.

    Args:
        x: (..., 2 C) float32, float16 or bfloat16: the values, then their gates; copied where it is not contiguous.

    Raises:
        Unsupported: another dtype, device or size of an operand, FP8 for a GPU that has none, or too many channels for
            a scale of each row.
    """
    if x.dim() == 0 or x.shape[-1] % 2:
        raise Unsupported(f"x is {tuple(x.shape)}, must have values and as many gates in its last axis")
    return producers.run_on_rows("geglu_quantize", x, x.shape[-1] // 2, inv_scale, inv_smooth, q_dtype)
