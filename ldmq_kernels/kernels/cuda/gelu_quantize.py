"""q = quantize(gelu(x)), in float32 up to the last rounding; csrc/gelu_quantize.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import producers
from ldmq_kernels.kernels.dispatch import Unsupported


def gelu_quantize(
    x: Tensor,
    tanh: bool,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """GELU and the quantization of its result.

    Args:
        x: (..., C) float32, float16 or bfloat16; copied where it is not contiguous.
        tanh: whether GELU goes by its approximation with tanh, or by the error function.

    Raises:
        Unsupported: another dtype, device or size of an operand, FP8 for a GPU that has none, or too many channels for
            a scale of each row.
    """
    if x.dim() == 0:
        raise Unsupported("x has no axis of channels")
    return producers.run_on_rows("gelu_quantize", x, x.shape[-1], inv_scale, inv_smooth, q_dtype, tanh=tanh)
