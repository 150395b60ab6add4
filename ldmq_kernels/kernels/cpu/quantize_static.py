"""q = clamp(rint(fp32(x) * r[c]), -127, 127), in one pass, or block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled
from ldmq_kernels.kernels.cpu.blocks import as_rows, quantize_rows
from ldmq_kernels.kernels.geometry import check_channels
from ldmq_kernels.kernels.operands import eight_bit


def quantize_static(x: Tensor, inv_scale: Tensor, channel_dim: int, q_dtype: torch.dtype | None = None) -> Tensor:
    """Quantize with a calibrated scale."""
    check_channels(x.shape[channel_dim] if x.dim() else 1, inv_scale)
    is_image = x.dim() == 4 and channel_dim == 1
    x = x.contiguous(memory_format=torch.channels_last if is_image else torch.contiguous_format)
    out = torch.empty_like(x, dtype=eight_bit(q_dtype))
    if x.numel():
        columns = x.shape[1] if is_image else x.shape[-1] if x.dim() else 1
        if out.dtype == torch.int8 and compiled.takes(x):
            compiled.quantize_calibrated(x, columns, inv_scale, out)
        else:
            rows, out_rows = (as_rows(t) if is_image else t.view(-1, columns) for t in (x, out))
            quantize_rows(rows, (inv_scale,), out_rows, is_static=True)
    return out
