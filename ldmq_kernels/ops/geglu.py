"""GEGLU layers of a feed-forward: the projection to values and gates, with the gated half in its epilogue.

The weight is that of the plain projection, (2 N, K): the rows of the values, then those of their gates. In float32 up
to one rounding, out = value * gelu(gate), both being (accumulator * x_scale * weight_scale + bias); GELU by the error
function. Between the product and the gate nothing is rounded, as it is where each is an op of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.agreement import AFTER_FLOAT8_SUMS, AFTER_FLOAT_SUMS
from ldmq_kernels.kernels.op_spec import LinearShape
from ldmq_kernels.numerics.formats.float8 import FLOAT8
from ldmq_kernels.ops.operands import of_value_and_gate
from ldmq_kernels.ops.spec import LDMQ, op


def _metadata(x: Tensor, per_output: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], per_output.shape[0] // 2), dtype=dtype)


@op(
    fake=lambda call: _metadata(call.x_q, call.weight_scale, call.out_dtype),
    shape=LinearShape(),
    example=of_value_and_gate,
    agreement=AFTER_FLOAT_SUMS,
)
def linear_geglu_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_inv_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """GEGLU layer on int8 activations and int8 weights, in 16 bit or quantized for the layer after it.

    out = value * gelu(gate), [value | gate] = (x_q @ weight^T) * x_scale * weight_scale + bias, the product in exact
    integers; with an `out_inv_scale` out is multiplied by it and rounded as `quantize_static` does.

    Args:
        x_q: (..., K) int8.
        x_scale: (1,) or (...) float32.
        weight: (2 N, K) int8: the rows of the values, then those of their gates.
        weight_scale: (2 N,) float32.
        bias: (2 N,) floating.
        out_inv_scale: (1,) or (N,) float32, the inverse smoothing vector of the next layer over its calibrated scale;
            None where its scale is measured.
        out_dtype: with an `out_inv_scale` int8 or float8_e4m3fn, else float16, bfloat16 or float32.

    Returns:
        (..., N) of `out_dtype`.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.linear_geglu_w8a8.default(x_q, x_scale, weight, weight_scale, bias, out_inv_scale, out_dtype)


@op(
    fake=lambda call: _metadata(call.x_q, call.weight_scale, call.out_dtype),
    shape=LinearShape(),
    example=of_value_and_gate,
    agreement=AFTER_FLOAT8_SUMS,
    operand_dtype=FLOAT8,
)
def linear_geglu_fp8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_inv_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """GEGLU layer on FP8 activations and FP8 weights, in 16 bit or quantized for the layer after it.

    out = value * gelu(gate), [value | gate] = (x_q @ weight^T) * x_scale * weight_scale + bias, summed as `linear_fp8`
    does; with an `out_inv_scale` out is multiplied by it and rounded as `quantize_static` does.

    Args:
        x_q: (..., K) float8_e4m3fn.
        x_scale: (1,) or (...) float32.
        weight: (2 N, K) float8_e4m3fn: the rows of the values, then those of their gates.
        weight_scale: (2 N,) float32.
        bias: (2 N,) floating.
        out_inv_scale: (1,) or (N,) float32, the inverse smoothing vector of the next layer over its calibrated scale;
            None where its scale is measured.
        out_dtype: with an `out_inv_scale` int8 or float8_e4m3fn, else float16, bfloat16 or float32.

    Returns:
        (..., N) of `out_dtype`.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.linear_geglu_fp8.default(x_q, x_scale, weight, weight_scale, bias, out_inv_scale, out_dtype)
