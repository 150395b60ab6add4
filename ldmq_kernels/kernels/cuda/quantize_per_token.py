"""scale = max(absmax(y), floor) / 127 of a token; q = clamp(rint(y * (1 / scale)), -127, 127); csrc/quantize.cu.

In FP8 448 takes the place of 127, and e4m3's values that of the integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.dispatch import Unsupported


def quantize_per_token(
    x: Tensor, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize each row with the scale of its own largest value.

    Args:
        x: (..., K) contiguous, float32, float16 or bfloat16.

    Raises:
        Unsupported: another dtype, layout or device, or FP8 for a GPU that has none.
    """
    if x.dim() == 0:
        raise Unsupported("x has no axis of channels")
    arguments = extension.source(x, torch.contiguous_format) | extension.dependent_target(x)
    stored = extension.quantized(x, q_dtype)
    channels = x.shape[-1]
    if inv_smooth is not None:
        extension.check_factors(inv_smooth, "inv_smooth", x, channels)
    q = torch.empty(x.shape, dtype=stored, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    extension.binding().quantize_per_token(
        **arguments,
        inv_smooth=0 if inv_smooth is None else inv_smooth.data_ptr(),
        **extension.stored_in(q),
        scale=scale.data_ptr(),
        rows=scale.numel(),
        channels=channels,
    )
    return q, scale
