"""Producers: a norm or an activation function and the quantization of its output, in float32 throughout.

Each gives (x_q, scale). With `inv_scale`, the inverse smoothing vector over a calibrated scale, it is static and its
second result is empty; without, `inv_smooth` is multiplied in and the scale is measured. They make int8 or FP8, as the
ops of `ops.quantize` do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.kernels.agreement import AFTER_FLOAT_SUMS
from ldmq_kernels.kernels.op_spec import ProducerShape
from ldmq_kernels.ops.operands import of_gated, of_picture, of_tokens
from ldmq_kernels.ops.quantize import quantized_like, scales
from ldmq_kernels.ops.spec import LDMQ, op


def _metadata(call: Any, channels: int) -> tuple[Tensor, Tensor]:
    rows = call.x.shape[:-1]
    q = call.x.new_empty((*rows, channels), dtype=call.q_dtype or torch.int8)
    return q, scales(call.x, rows if call.inv_scale is None else (0,))


def _group_norm_metadata(call: Any) -> tuple[Tensor, Tensor]:
    samples, _, *size = call.x.shape
    measured = (samples, *size) if call.per_token else (samples,)
    return quantized_like(call.x, call.q_dtype, is_picture=True), scales(
        call.x, measured if call.inv_scale is None else (0,)
    )


@op(fake=_group_norm_metadata, shape=ProducerShape(takes_pictures=True), example=of_picture, agreement=AFTER_FLOAT_SUMS)
def group_norm_silu_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    per_token: bool,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Group normalization, SiLU where asked for, and the quantization of the result.

    q = quantize(silu(group_norm(x))), in float32 up to the last rounding.

    The scale of a sample comes from the extremes of each channel before SiLU, so that one pass over memory
    finds the statistics and the extremes, and a second one quantizes: it is the largest value that SiLU takes
    between them, which is the largest absolute value itself unless all of the sample lies in SiLU's dip.

    Args:
        x: (N, C, H, W) floating.
        norm_weight: (C,) floating, or None for ones.
        norm_bias: (C,) floating, or None for zeros.
        num_groups: divides C.
        eps: added to the variance.
        silu: whether SiLU follows.
        inv_scale: (1,) or (C,) float32, the inverse smoothing vector over a calibrated scale; None measures the
            scale.
        inv_smooth: (C,) float32 inverse smoothing vector, multiplied in where the scale is measured.
        per_token: whether a measured scale is each pixel's own, and not each sample's.
        q_dtype: torch.float8_e4m3fn for FP8; None is int8.

    Returns:
        (N, C, H, W) of `q_dtype`, channels_last, and the scales, float32: (N,), (N, H, W) if `per_token`, or (0,)
        with an `inv_scale`.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.group_norm_silu_quantize.default(
        x, norm_weight, norm_bias, num_groups, eps, silu, inv_scale, inv_smooth, per_token, q_dtype
    )


@op(
    fake=lambda call: _metadata(call, call.x.shape[-1]),
    shape=ProducerShape(),
    example=of_tokens,
    agreement=AFTER_FLOAT_SUMS,
)
def layer_norm_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    modulation_scale: Tensor | None = None,
    modulation_shift: Tensor | None = None,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Layer normalization over the last axis, its modulation where there is one, and the quantization of the result.

    q = quantize(layer_norm(x) * (1 + modulation_scale) + modulation_shift), in float32 up to the last rounding.

    Args:
        x: (..., C) floating.
        norm_weight: (C,) floating, or None for ones.
        norm_bias: (C,) floating, or None for zeros.
        eps: added to the variance.
        inv_scale: (1,) or (C,) float32, the inverse smoothing vector over a calibrated scale; None measures the
            scale.
        inv_smooth: (C,) float32 inverse smoothing vector, multiplied in where the scale is measured.
        modulation_scale: (G, ..., C) floating, what is added to one to multiply the norm's output: one row of C for
            each of G equal runs of rows, such as (samples, 1, C).
        modulation_shift: as modulation_scale, and added after.
        q_dtype: torch.float8_e4m3fn for FP8; None is int8.

    Returns:
        (..., C) of `q_dtype` and the scales (...) float32, or (0,) with an `inv_scale`.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.layer_norm_quantize.default(
        x, norm_weight, norm_bias, eps, inv_scale, inv_smooth, modulation_scale, modulation_shift, q_dtype
    )


@op(
    fake=lambda call: _metadata(call, call.x.shape[-1] // 2),
    shape=ProducerShape(),
    example=of_gated,
    agreement=AFTER_FLOAT_SUMS,
)
def geglu_quantize(
    x: Tensor,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated half of a GEGLU layer and the quantization of its result.

    q = quantize(value * gelu(gate)), in float32 up to the last rounding; GELU by the error function.

    Args:
        x: (..., 2 C) floating: the values, then their gates.
        inv_scale: (1,) or (C,) float32, the inverse smoothing vector over a calibrated scale; None measures the
            scale.
        inv_smooth: (C,) float32 inverse smoothing vector, multiplied in where the scale is measured.
        q_dtype: torch.float8_e4m3fn for FP8; None is int8.

    Returns:
        (..., C) of `q_dtype` and the scales (...) float32, or (0,) with an `inv_scale`.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.geglu_quantize.default(x, inv_scale, inv_smooth, q_dtype)


@op(
    fake=lambda call: _metadata(call, call.x.shape[-1]),
    shape=ProducerShape(),
    example=of_tokens,
    agreement=AFTER_FLOAT_SUMS,
)
def silu_quantize(
    x: Tensor,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """SiLU and the quantization of its result.

    q = quantize(silu(x)), in float32 up to the last rounding.

    Args:
        x: (..., C) floating.
        inv_scale: (1,) or (C,) float32, the inverse smoothing vector over a calibrated scale; None measures the
            scale.
        inv_smooth: (C,) float32 inverse smoothing vector, multiplied in where the scale is measured.
        q_dtype: torch.float8_e4m3fn for FP8; None is int8.

    Returns:
        (..., C) of `q_dtype` and the scales (...) float32, or (0,) with an `inv_scale`.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.silu_quantize.default(x, inv_scale, inv_smooth, q_dtype)


@op(
    fake=lambda call: _metadata(call, call.x.shape[-1]),
    shape=ProducerShape(),
    example=of_tokens,
    agreement=AFTER_FLOAT_SUMS,
)
def gelu_quantize(
    x: Tensor,
    tanh: bool,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """GELU and the quantization of its result.

    q = quantize(gelu(x)), in float32 up to the last rounding.

    Args:
        x: (..., C) floating.
        tanh: whether GELU is its approximation by the hyperbolic tangent, and not by the error function.
        inv_scale: (1,) or (C,) float32, the inverse smoothing vector over a calibrated scale; None measures the
            scale.
        inv_smooth: (C,) float32 inverse smoothing vector, multiplied in where the scale is measured.
        q_dtype: torch.float8_e4m3fn for FP8; None is int8.

    Returns:
        (..., C) of `q_dtype` and the scales (...) float32, or (0,) with an `inv_scale`.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.gelu_quantize.default(x, tanh, inv_scale, inv_smooth, q_dtype)
