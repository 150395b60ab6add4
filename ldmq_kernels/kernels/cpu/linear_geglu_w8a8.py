"""out = value * gelu(gate), of the halves of an exact product; in its epilogue where that is multiplied in tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import products
from ldmq_kernels.kernels.cpu.compiled import Epilogue
from ldmq_kernels.kernels.cpu.linear_w8a8 import linear_w8a8
from ldmq_kernels.kernels.cpu.packing import is_packed, pack_linear
from ldmq_kernels.kernels.operands import check_gated_output
from ldmq_kernels.kernels.reference.linear_geglu_w8a8 import gated
from ldmq_kernels.numerics.formats.float8 import FLOAT8


def linear_geglu_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_inv_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """GEGLU layer on int8 activations and int8 weights.

    Halves that are no whole panels of 16 outputs, and an output in FP8, are gated in a pass of their own.
    """
    outputs = weight_scale.shape[0]
    check_gated_output(out_inv_scale, out_dtype, outputs // 2)
    packed = weight if is_packed(weight) else pack_linear(weight)
    if not products.gates(packed, outputs) or out_dtype == FLOAT8:
        product = linear_w8a8(x_q, x_scale, packed, weight_scale, bias, None, torch.float32)
        return gated(product, out_inv_scale, out_dtype)
    epilogue = Epilogue(x_scale, weight_scale, bias)
    return products.linear(x_q, packed, epilogue, outputs, out_dtype, products.Gating(out_inv_scale))
