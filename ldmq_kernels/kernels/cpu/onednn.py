"""The calls into oneDNN, with what is the same in all of them: zero points, no fused post-operation."""

from __future__ import annotations

import torch
from torch import Tensor

ZERO_POINT = 128
OPS = ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv_pointwise")


def is_built_in() -> bool:
    """Whether this torch has oneDNN's int8 ops."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, name) for name in OPS)


def to_uint8(x_q: Tensor) -> Tensor:
    """int8 to uint8 with zero point 128; oneDNN is a thousand times slower on signed activations."""
    return x_q.view(torch.uint8) ^ ZERO_POINT


def prepack_linear(weight: Tensor) -> Tensor:
    """(N, K) int8 to oneDNN's blocked form, a (K, N) tensor."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def prepack_conv2d(
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    input_shape: torch.Size,
) -> Tensor:
    """(K, C / groups, R, S) int8 to the blocked form that suits inputs of `input_shape`."""
    ones = torch.ones(weight.shape[0], dtype=torch.float32, device="cpu")
    return torch.ops.onednn.qconv_prepack(
        weight, ones, 1.0, ZERO_POINT, stride, padding, dilation, groups, list(input_shape)
    )


def linear(
    x_q: Tensor, x_scale: float, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """x_q (M, K) int8 by a prepacked weight, scaled; (M, N) float32 or bfloat16."""
    zero_points = torch.zeros_like(weight_scale, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        to_uint8(x_q),
        x_scale,
        ZERO_POINT,
        packed,
        weight_scale.contiguous(),  # oneDNN does not look at strides
        zero_points,
        None if bias is None else bias.contiguous(),
        1.0,
        0,
        out_dtype,
        "none",
        [],
        "",
    )


def conv2d(
    x_q: Tensor,
    x_scale: float,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """x_q (N, C, H, W) int8, channels_last, by a prepacked weight, scaled; float32 or bfloat16, channels_last."""
    zero_points = torch.zeros_like(weight_scale, dtype=torch.int32)
    return torch.ops.onednn.qconv_pointwise(
        to_uint8(x_q),
        x_scale,
        ZERO_POINT,
        packed,
        weight_scale.contiguous(),  # oneDNN does not look at strides
        zero_points,
        None if bias is None else bias.contiguous(),
        stride,
        padding,
        dilation,
        groups,
        1.0,
        0,
        out_dtype,
        "none",
        [],
        "",
    )
