"""scale = max(absmax(y), floor) / 127 for each sample; q = clamp(rint(y * (1 / scale)), -127, 127)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled
from ldmq_kernels.kernels.cpu.blocks import as_rows, quantize_rows, row_blocks
from ldmq_kernels.kernels.geometry import check_channels
from ldmq_kernels.kernels.operands import eight_bit
from ldmq_kernels.kernels.reference.quantize_per_token import dynamic_scale
from ldmq_kernels.numerics.formats.float8 import FLOAT8


def _absmax(rows: Tensor, inv_smooth: Tensor | None) -> Tensor:
    """Largest absolute value of fp32(rows) * smoothing, without making the product: rounding keeps order."""
    if inv_smooth is None:
        lowest, highest = torch.aminmax(rows)
        return torch.maximum(highest, -lowest).float()
    return (torch.maximum(rows.amax(0), -rows.amin(0)).float() * inv_smooth).amax()


def quantize_per_sample(
    x: Tensor, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize each picture of a batch with the scale of its own largest value."""
    check_channels(x.shape[1], inv_smooth)
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, dtype=eight_bit(q_dtype))
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    if not x.numel():
        return out, scale
    if out.dtype == torch.int8 and compiled.takes(x):
        compiled.quantize_measured(x, x.shape[1], inv_smooth, out, scale)
        return out, scale
    for block in row_blocks(x.shape[0], x[0].numel()):
        if x[block].shape[0] == 1:
            scale[block] = _quantize_one(x[block], inv_smooth, out[block])
        else:
            scale[block] = _quantize_together(x[block], inv_smooth, out[block])
    return out, scale


def _quantize_one(x: Tensor, inv_smooth: Tensor | None, out: Tensor) -> Tensor:
    """One sample, which may be larger than the cache; writes `out` and gives the scale (1,)."""
    rows = as_rows(x)
    scale = dynamic_scale(_absmax(rows, inv_smooth), out.dtype).reshape(1)
    quantize_rows(rows, (1 / scale,) if inv_smooth is None else (inv_smooth, 1 / scale), as_rows(out))
    return scale


def _quantize_together(x: Tensor, inv_smooth: Tensor | None, out: Tensor) -> Tensor:
    """Several samples that fit the cache together; writes `out` and gives the scales (n,)."""
    y = x.permute(0, 2, 3, 1).float()
    y = y * inv_smooth if inv_smooth is not None else y
    scale = dynamic_scale(torch.maximum(y.amax((1, 2, 3)), y.amin((1, 2, 3)).neg_()), out.dtype)
    # no clamp: absmax times the reciprocal of its own scale rounds to 127, or to 448 as it is copied
    y = y * (1 / scale).view(-1, 1, 1, 1)
    out.permute(0, 2, 3, 1).copy_(y if out.dtype == FLOAT8 else y.round_())
    return scale
