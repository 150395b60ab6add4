"""The int8 linear over int4 weights times their group multipliers, unpacked in registers; csrc/products.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import product
from ldmq_kernels.numerics.formats.int4 import group_count


def linear_w4a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Linear layer on int8 activations and two-level int4 weights.

    Args:
        x_q: (..., K) int8, K a multiple of 32.
        x_scale: (1,) or (...) float32.
        weight: (N, K / 2) uint8 holding int4, N a multiple of 8.
        multiplier: (N, groups) uint8 in 1..18.
        weight_scale: (N,) float32.
        bias: (N,) floating.
        residual: (..., N) of `out_dtype`, added last.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        (..., N) of `out_dtype`.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    depth, columns = x_q.shape[-1], weight_scale.shape[0]
    weight = product.plain(weight, torch.uint8, (columns, -(-depth // 2)))
    multiplier = product.plain(multiplier, torch.uint8, (columns, group_count(depth)))
    x = product.int8(x_q).reshape(-1, depth).contiguous()
    out = torch.empty((*x_q.shape[:-1], columns), dtype=out_dtype, device=x.device)
    terms = product.Terms(x_scale, weight_scale, bias, residual)
    return product.run("linear_w4a8", x, weight, multiplier, terms, out, depth=depth)
