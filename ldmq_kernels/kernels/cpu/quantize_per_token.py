"""scale = max(absmax(y), floor) / 127 for each token; q = clamp(rint(y * (1 / scale)), -127, 127)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled
from ldmq_kernels.kernels.cpu.blocks import row_blocks
from ldmq_kernels.kernels.geometry import check_channels
from ldmq_kernels.kernels.operands import eight_bit
from ldmq_kernels.kernels.reference.quantize_per_token import dynamic_scale
from ldmq_kernels.numerics.formats.float8 import FLOAT8


def quantize_per_token(
    x: Tensor, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize each row with the scale of its own largest value."""
    check_channels(x.shape[-1], inv_smooth)
    x = x.contiguous()
    out = torch.empty_like(x, dtype=eight_bit(q_dtype))
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if not x.numel():
        return out, scale
    if out.dtype == torch.int8 and compiled.takes(x):
        compiled.quantize_measured(x, x.shape[-1], inv_smooth, out, scale)
        return out, scale
    rows, out_rows, scales = x.view(-1, x.shape[-1]), out.view(-1, x.shape[-1]), scale.view(-1)
    buffer = None
    for block in row_blocks(*rows.shape):
        chunk = rows[block]
        if buffer is None:
            buffer = chunk.new_empty(chunk.shape, dtype=torch.float32)
        y = buffer[: chunk.shape[0]].copy_(chunk)
        if inv_smooth is not None:
            y.mul_(inv_smooth)
        absmax = torch.maximum(y.amax(-1), y.amin(-1).neg_())
        scales[block] = dynamic_scale(absmax, q_dtype)
        # no clamp: absmax times the reciprocal of its own scale rounds to 127, or to 448 as it is copied
        y.mul_((1 / scales[block]).unsqueeze(-1))
        out_rows[block].copy_(y if q_dtype == FLOAT8 else y.round_())
    return out, scale
