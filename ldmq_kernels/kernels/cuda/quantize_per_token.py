"""scale = max(absmax(y), floor) / 127 of a token; q = clamp(rint(y * (1 / scale)), -127, 127); csrc/quantize.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.operands import only_int8


def quantize_per_token(
    x: Tensor, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize each row with the scale of its own largest value.

    Args:
        x: (..., K) contiguous, float32, float16 or bfloat16.

    Raises:
        Unsupported: FP8, another dtype, layout or device.
    """
    only_int8(q_dtype)
    if x.dim() == 0:
        raise Unsupported("x has no axis of channels")
    arguments = extension.source(x, torch.contiguous_format) | extension.target(x)
    channels = x.shape[-1]
    if inv_smooth is not None:
        extension.check_factors(inv_smooth, "inv_smooth", x, channels)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    extension.binding().quantize_per_token(
        **arguments,
        inv_smooth=0 if inv_smooth is None else inv_smooth.data_ptr(),
        q=q.data_ptr(),
        scale=scale.data_ptr(),
        rows=scale.numel(),
        channels=channels,
    )
    return q, scale
