"""out = value * gelu(gate), of the halves of an exact product; in its epilogue where that is multiplied in tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.backend import Unsupported
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
    rows = x_q.reshape(-1, x_q.shape[-1]).contiguous()
    if not products.gates(packed, outputs) or out_dtype == FLOAT8 or not rows.shape[0]:
        product = linear_w8a8(x_q, x_scale, packed, weight_scale, bias, None, torch.float32)
        return gated(product, out_inv_scale, out_dtype)
    if products.channels_of(packed) != rows.shape[1]:
        raise Unsupported(f"the input has {rows.shape[1]} channels, the weight {products.channels_of(packed)}")
    epilogue = Epilogue(x_scale.reshape(-1), weight_scale, bias)
    out = products.linear(rows, packed, epilogue, outputs, out_dtype, products.Gating(out_inv_scale))
    return out.view(*x_q.shape[:-1], outputs // 2)
