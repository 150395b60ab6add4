"""Linear layers on quantized weights.

The epilogue, in float32, is rounded once: out = (accumulator * x_scale * weight_scale + bias) * gate + residual. int4
weights hold two values to a byte along the last axis, low nibble first. A weight may also be in the packed layout of a
backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.agreement import FLOAT8_SUMS
from ldmq_kernels.kernels.op_spec import LinearShape
from ldmq_kernels.numerics.formats.float8 import FLOAT8
from ldmq_kernels.ops.operands import of_tokens
from ldmq_kernels.ops.spec import LDMQ, op


def _metadata(x: Tensor, per_output: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], per_output.shape[0]), dtype=dtype)


@op(fake=lambda call: _metadata(call.x_q, call.weight_scale, call.out_dtype), shape=LinearShape(), example=of_tokens)
def linear_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear layer on int8 activations and int8 weights.

    out = ((x_q @ weight^T) * x_scale * weight_scale + bias) * gate + residual, the product in exact integers.

    Args:
        x_q: (..., K) int8.
        x_scale: (1,) or (...) float32.
        weight: (N, K) int8, or a backend's packed form of it.
        weight_scale: (N,) float32.
        bias: (N,) floating.
        residual: (..., N) floating, added last.
        out_dtype: float16, bfloat16 or float32.
        gate: (G, ..., N) floating, what each product with its bias is multiplied by before the residual is added: one
            row of N for each of G equal runs of rows, such as (samples, 1, N).

    Returns:
        (..., N) of `out_dtype`.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.linear_w8a8.default(x_q, x_scale, weight, weight_scale, bias, residual, out_dtype, gate)


@op(fake=lambda call: _metadata(call.x_q, call.weight_scale, call.out_dtype), shape=LinearShape(), example=of_tokens)
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

    out = ((x_q @ (weight * multiplier)^T) * x_scale * weight_scale + bias) * gate + residual, in exact integers.

    Args:
        x_q: (..., K) int8.
        x_scale: (1,) or (...) float32.
        weight: (N, ceil(K / 2)) uint8 holding int4, or a backend's packed form of it.
        multiplier: (N, groups) uint8 in 1..18.
        weight_scale: (N,) float32.
        bias: (N,) floating.
        residual: (..., N) floating, added last.
        out_dtype: float16, bfloat16 or float32.
        gate: (G, ..., N) floating, what each product with its bias is multiplied by before the residual is added: one
            row of N for each of G equal runs of rows, such as (samples, 1, N).

    Returns:
        (..., N) of `out_dtype`.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.linear_w4a8.default(x_q, x_scale, weight, multiplier, weight_scale, bias, residual, out_dtype, gate)


@op(fake=lambda call: _metadata(call.x, call.weight_scale, call.x.dtype), shape=LinearShape(), example=of_tokens)
def linear_static_w8a8(
    x: Tensor,
    inv_scale: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear layer that quantizes its input with a calibrated scale and multiplies int8 by int8.

    out = ((quantize_static(x) @ weight^T) * x_scale * weight_scale + bias) * gate + residual, in exact integers.

    Args:
        x: (..., K) floating.
        inv_scale: (1,) or (K,) float32, the inverse smoothing vector over the scale.
        x_scale: (1,) float32, the scale.
        weight: (N, K) int8, or a backend's packed form of it.
        weight_scale: (N,) float32.
        bias: (N,) floating.
        residual: (..., N) floating, added last.
        gate: (G, ..., N) floating, what each product with its bias is multiplied by before the residual is added: one
            row of N for each of G equal runs of rows, such as (samples, 1, N).

    Returns:
        (..., N) of x's dtype.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.linear_static_w8a8.default(x, inv_scale, x_scale, weight, weight_scale, bias, residual, gate)


@op(
    fake=lambda call: _metadata(call.x_q, call.weight_scale, call.out_dtype),
    shape=LinearShape(),
    example=of_tokens,
    agreement=FLOAT8_SUMS,
    operand_dtype=FLOAT8,
)
def linear_fp8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear layer on FP8 activations and FP8 weights.

    out = ((x_q @ weight^T) * x_scale * weight_scale + bias) * gate + residual, each product exact in
    float32, and their sum in float32; on Hopper, whose tensor cores keep about 14 bits of it, a kernel may sum so.

    Args:
        x_q: (..., K) float8_e4m3fn.
        x_scale: (1,) or (...) float32.
        weight: (N, K) float8_e4m3fn, or a backend's packed form of it.
        weight_scale: (N,) float32.
        bias: (N,) floating.
        residual: (..., N) floating, added last.
        out_dtype: float16, bfloat16 or float32.
        gate: (G, ..., N) floating, what each product with its bias is multiplied by before the residual is added: one
            row of N for each of G equal runs of rows, such as (samples, 1, N).

    Returns:
        (..., N) of `out_dtype`.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.linear_fp8.default(x_q, x_scale, weight, weight_scale, bias, residual, out_dtype, gate)


@op(
    fake=lambda call: _metadata(call.x, call.weight_scale, call.x.dtype),
    shape=LinearShape(),
    example=of_tokens,
    rounds=False,
)
def linear_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Linear layer on int8 weights and floating activations.

    out = (x @ weight^T) * weight_scale + bias, in float32, rounded once.

    Args:
        x: (..., K) floating.
        weight: (N, K) int8.
        weight_scale: (N,) float32.
        bias: (N,) floating.

    Returns:
        (..., N) of x's dtype.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.linear_w8a16.default(x, weight, weight_scale, bias)


@op(
    fake=lambda call: _metadata(call.x, call.group_scale, call.x.dtype),
    shape=LinearShape("group_scale"),
    example=of_tokens,
    rounds=False,
)
def linear_w4a16(
    x: Tensor,
    weight: Tensor,
    group_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Linear layer on int4 weights with a scale for each group, and floating activations.

    out = x @ (weight * group_scale)^T + bias, in float32, rounded once.

    Args:
        x: (..., K) floating.
        weight: (N, ceil(K / 2)) uint8 holding int4.
        group_scale: (N, groups) float32.
        bias: (N,) floating.

    Returns:
        (..., N) of x's dtype.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.linear_w4a16.default(x, weight, group_scale, bias)
