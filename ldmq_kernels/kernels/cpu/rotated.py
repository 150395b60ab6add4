"""H (x * inv_smooth) by `rotate.c`, or by the definition where there is no C library: the same bits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled
from ldmq_kernels.numerics.hadamard import block_size, rotate, signs


@functools.cache
def _signs(channels: int) -> Tensor:
    """The signs of so many channels, (channels,) float32: finding them takes longer than a small product."""
    with torch.inference_mode(False):  # or no later call could be differentiated
        return signs(channels, torch.device("cpu")).float()


def rotated(x: Tensor, inv_smooth: Tensor | None = None) -> Tensor:
    """Rotate the channels of x (..., C), times `inv_smooth` (1,) or (C,) if given.

    Returns:
        (..., C) float32, contiguous.
    """
    if not compiled.takes(x):
        y = x.float()
        return rotate(y if inv_smooth is None else y * inv_smooth)
    x, channels = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x, dtype=torch.float32)
    if x.numel():
        factors = _signs(channels) if inv_smooth is None else _signs(channels) * compiled.in_float32(inv_smooth)
        compiled.call(
            "ldmq_rotate",
            compiled.threads(x),
            *(x.data_ptr(), x.dtype == torch.bfloat16, x.numel() // channels, channels, block_size(channels)),
            *(factors.data_ptr(), out.data_ptr()),
        )
    return out
