"""scale = max(absmax(y), floor) / 127 of a sample; q = clamp(rint(y * (1 / scale)), -127, 127); csrc/quantize.cu.

In FP8 448 takes the place of 127, and e4m3's values that of the integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.dispatch import Unsupported


def quantize_per_sample(
    x: Tensor, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize each image of a batch with the scale of its own largest value.

    Args:
        x: (N, C, H, W) channels_last, float32, float16 or bfloat16.

    Raises:
        Unsupported: another dtype, layout or device, or FP8 for a GPU that has none.
    """
    if x.dim() != 4:
        raise Unsupported(f"x has {x.dim()} axes, must be (N, C, H, W)")
    arguments = extension.source(x, torch.channels_last) | extension.dependent_target(x)
    stored = extension.quantized(x, q_dtype)
    samples, channels, height, width = x.shape
    if inv_smooth is not None:
        extension.check_factors(inv_smooth, "inv_smooth", x, channels)
    q = torch.empty(x.shape, dtype=stored, device=x.device, memory_format=torch.channels_last)
    scale = torch.empty(samples, dtype=torch.float32, device=x.device)
    absmax = torch.empty(samples, dtype=torch.int32, device=x.device)
    extension.binding().quantize_per_sample(
        **arguments,
        inv_smooth=0 if inv_smooth is None else inv_smooth.data_ptr(),
        **extension.stored_in(q),
        scale=scale.data_ptr(),
        absmax=absmax.data_ptr(),
        samples=samples,
        pixels=height * width,
        channels=channels,
    )
    return q, scale
