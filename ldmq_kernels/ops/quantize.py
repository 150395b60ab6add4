"""Quantization of activations: with a calibrated scale, or with one measured for each token or picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmq_kernels.kernels.op_spec import InputShape
from ldmq_kernels.ops.operands import of_either, of_picture, of_tokens
from ldmq_kernels.ops.spec import LDMQ, op


def quantized_like(x: Tensor, q_dtype: torch.dtype | None, is_picture: bool = False) -> Tensor:
    """The metadata of quantized values of x's shape, int8 without a dtype; channels_last for a 4-D picture."""
    if is_picture and x.dim() == 4:
        return torch.empty(x.shape, dtype=q_dtype or torch.int8, device=x.device, memory_format=torch.channels_last)
    return x.new_empty(x.shape, dtype=q_dtype or torch.int8)


def scales(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The metadata of float32 scales beside x."""
    return x.new_empty(tuple(shape), dtype=torch.float32)


@op(
    fake=lambda call: quantized_like(call.x, call.q_dtype, call.channel_dim == 1),
    shape=InputShape(takes_pictures=True),
    example=of_either,
)
def quantize_static(
    x: Tensor,
    inv_scale: Tensor,
    channel_dim: int,
    q_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize with a calibrated scale.

    q = clamp(rint(fp32(x) * r[c]), -127, 127), with r made once from the scale and the smoothing.

    Args:
        x: any shape, floating; (N, C, H, W) where `channel_dim` is 1.
        inv_scale: (1,) or (C,) float32, the inverse smoothing vector over the scale.
        channel_dim: the axis of x that `inv_scale` runs along, 1 or -1.
        q_dtype: torch.float8_e4m3fn for FP8: clamped to [-448, 448] and rounded to nearest, half to even; NaN stays.
            None is int8.

    Returns:
        `q_dtype` of x's shape, channels_last for a 4-D x with channels in axis 1.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.quantize_static.default(x, inv_scale, channel_dim, q_dtype)


@op(
    fake=lambda call: (quantized_like(call.x, call.q_dtype), scales(call.x, call.x.shape[:-1])),
    shape=InputShape(),
    example=of_tokens,
)
def quantize_per_token(
    x: Tensor,
    inv_smooth: Tensor | None,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize each row with the scale of its own largest value.

    scale = max(absmax(y), floor) / 127 for each token; q = clamp(rint(y * (1 / scale)), -127, 127).

    Args:
        x: (..., K) floating.
        inv_smooth: (K,) float32 inverse smoothing vector, multiplied in first.
        q_dtype: torch.float8_e4m3fn for FP8: 448 takes the place of 127, and values are rounded as e4m3 has them; None
            is int8.

    Returns:
        (..., K) of `q_dtype` and the scales (...) float32.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.quantize_per_token.default(x, inv_smooth, q_dtype)


@op(
    fake=lambda call: (quantized_like(call.x, call.q_dtype, is_picture=True), scales(call.x, call.x.shape[:1])),
    shape=InputShape(takes_pictures=True),
    example=of_picture,
)
def quantize_per_sample(
    x: Tensor,
    inv_smooth: Tensor | None,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize each picture of a batch with the scale of its own largest value.

    scale = max(absmax(y), floor) / 127 for each sample; q = clamp(rint(y * (1 / scale)), -127, 127).

    Args:
        x: (N, C, H, W) floating.
        inv_smooth: (C,) float32 inverse smoothing vector, multiplied in first.
        q_dtype: torch.float8_e4m3fn for FP8: 448 takes the place of 127, and values are rounded as e4m3 has them; None
            is int8.

    Returns:
        (N, C, H, W) of `q_dtype`, channels_last, and the scales (N,) float32.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.quantize_per_sample.default(x, inv_smooth, q_dtype)


@op(
    fake=lambda call: (quantized_like(call.x, None), scales(call.x, call.x.shape[:-1])),
    shape=InputShape(),
    example=of_tokens,
)
def rotate_quantize_per_token(
    x: Tensor,
    inv_smooth: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Rotate the channels by a Hadamard matrix, and quantize each row with the scale of its own largest value.

    y = H (x * inv_smooth), H of 1 and -1 over blocks of up to 32 channels, see `numerics.hadamard`; then as
    `quantize_per_token`.

    Args:
        x: (..., K) floating.
        inv_smooth: (K,) float32 inverse smoothing vector, multiplied in first.

    Returns:
        (..., K) int8 and the scales (...) float32.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.rotate_quantize_per_token.default(x, inv_smooth)


@op(
    fake=lambda call: (quantized_like(call.x, None, is_picture=True), scales(call.x, call.x.shape[:1])),
    shape=InputShape(takes_pictures=True),
    example=of_picture,
)
def rotate_quantize_per_sample(
    x: Tensor,
    inv_smooth: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Rotate the channels by a Hadamard matrix, and quantize each picture with the scale of its own largest value.

    y = H (x * inv_smooth) at each pixel, H of 1 and -1 over blocks of up to 32 channels, see `numerics.hadamard`;
    then as `quantize_per_sample`.

    Args:
        x: (N, C, H, W) floating.
        inv_smooth: (C,) float32 inverse smoothing vector, multiplied in first.

    Returns:
        (N, C, H, W) int8, channels_last, and the scales (N,) float32.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.rotate_quantize_per_sample.default(x, inv_smooth)
