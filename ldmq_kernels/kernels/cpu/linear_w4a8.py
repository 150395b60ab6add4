"""The int8 linear over int4 weights times their group multipliers, which is an exact int8 weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu.linear_w8a8 import linear_w8a8
from ldmq_kernels.kernels.cpu.packing import is_packed
from ldmq_kernels.numerics.formats.int4 import unpack_int4
from ldmq_kernels.numerics.formats.int4_two_level import fold_multiplier


def linear_w4a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear layer on int8 activations and two-level int4 weights.

    A plain weight is folded and packed anew in each call; a layer holds it packed by `packing.pack_linear`.
    """
    if not is_packed(weight):
        weight = fold_multiplier(unpack_int4(weight, x_q.shape[-1]), multiplier)
    return linear_w8a8(x_q, x_scale, weight, weight_scale, bias, residual, out_dtype, gate)
