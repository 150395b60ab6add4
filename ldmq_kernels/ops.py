"""The ops of the package, `torch.ops.ldmq.*`: one node each for torch.compile, graphs and export.

Each op is defined here with its schema and its fake kernel. What computes it is chosen when the
op runs, by `ldmq_kernels.kernels.dispatch`, among the backends' functions of the same name.

Shapes: `x_q` of a linear is (..., K) and of a convolution (N, C, H, W), channels_last in memory.
Weights are (N, K) and (K, R, S, C / groups); int4 ones hold two values to a byte along the last
axis (`numerics.formats.int4`). A weight may also be a backend's packed tensor; that is why
convolutions are told their `kernel_size`; their `padding` is (top, bottom, left, right), and `upsample`
enlarges the input first, by nearest neighbours. Scales are float32. `x_scale` has one element (static)
or one for each token, (...), or sample, (N,). `weight_scale` is (out,). `multiplier` (uint8) and
`group_scale` (float32) are (N, groups) for a linear and (K, R, S, groups) for a convolution.

A producer (norm, SiLU, GEGLU) with the quantization of its output gives (x_q, scale). With `inv_scale`, the
smoothing's reciprocal over a calibrated scale, it is static and its second result is empty; without, `inv_smooth`
is multiplied in and the scale is measured. In float32 throughout.

Epilogue, in float32, rounded once to `out_dtype`:

    out = accumulator * x_scale * weight_scale + bias + sample_bias[:, :, None, None] + residual
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.geometry import conv2d_output_size

_LIBRARY = torch.library.Library("ldmq", "DEF")

_CONV = "int[2] kernel_size, int[2] stride, int[4] padding, int[2] dilation, int groups, int upsample"
_NORM = "Tensor? norm_weight, Tensor? norm_bias"
_QUANTIZE = "Tensor? inv_scale, Tensor? inv_smooth"
SCHEMAS = {
    "quantize_static": "(Tensor x, Tensor inv_scale, int channel_dim) -> Tensor",
    "quantize_per_token": "(Tensor x, Tensor? inv_smooth) -> (Tensor, Tensor)",
    "quantize_per_sample": "(Tensor x, Tensor? inv_smooth) -> (Tensor, Tensor)",
    "group_norm_silu_quantize": f"(Tensor x, {_NORM}, int num_groups, float eps, bool silu, {_QUANTIZE}, "
    "bool per_token) -> (Tensor, Tensor)",
    "layer_norm_quantize": f"(Tensor x, {_NORM}, float eps, {_QUANTIZE}) -> (Tensor, Tensor)",
    "geglu_quantize": f"(Tensor x, {_QUANTIZE}) -> (Tensor, Tensor)",
    "silu_quantize": f"(Tensor x, {_QUANTIZE}) -> (Tensor, Tensor)",
    "linear_w8a8": "(Tensor x_q, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "Tensor? residual, ScalarType out_dtype) -> Tensor",
    "linear_w4a8": "(Tensor x_q, Tensor x_scale, Tensor weight, Tensor multiplier, Tensor weight_scale, "
    "Tensor? bias, Tensor? residual, ScalarType out_dtype) -> Tensor",
    "linear_static_w8a8": "(Tensor x, Tensor inv_scale, Tensor x_scale, Tensor weight, Tensor weight_scale, "
    "Tensor? bias, Tensor? residual) -> Tensor",
    "linear_w8a16": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    "linear_w4a16": "(Tensor x, Tensor weight, Tensor group_scale, Tensor? bias) -> Tensor",
    "conv2d_w8a8": "(Tensor x_q, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
    f"Tensor? sample_bias, Tensor? residual, {_CONV}, ScalarType out_dtype) -> Tensor",
    "conv2d_w4a8": "(Tensor x_q, Tensor x_scale, Tensor weight, Tensor multiplier, Tensor weight_scale, "
    f"Tensor? bias, Tensor? sample_bias, Tensor? residual, {_CONV}, ScalarType out_dtype) -> Tensor",
    "conv2d_w8a16": f"(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, {_CONV}) -> Tensor",
}


def _channels_last(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _fake_quantize_static(x: Tensor, inv_scale: Tensor, channel_dim: int) -> Tensor:
    if x.dim() == 4 and channel_dim == 1:
        return _channels_last(x, tuple(x.shape), torch.int8)
    return x.new_empty(x.shape, dtype=torch.int8)


def _fake_quantize_per_token(x: Tensor, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_quantize_per_sample(x: Tensor, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    return _channels_last(x, tuple(x.shape), torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


def _fake_group_norm_silu_quantize(
    x: Tensor,
    _weight: Any,
    _bias: Any,
    _groups: int,
    _eps: float,
    _silu: bool,
    inv_scale: Any,
    _s: Any,
    per_token: bool,
) -> tuple[Tensor, Tensor]:
    scales = (0,) if inv_scale is not None else (x.shape[0], *x.shape[2:]) if per_token else (x.shape[0],)
    return _channels_last(x, tuple(x.shape), torch.int8), x.new_empty(scales, dtype=torch.float32)


def _fake_producer(x: Tensor, channels: int, inv_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    scales = x.shape[:-1] if inv_scale is None else (0,)
    return x.new_empty((*x.shape[:-1], channels), dtype=torch.int8), x.new_empty(scales, dtype=torch.float32)


def _fake_linear(x: Tensor, out_features: int, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)


def _fake_conv2d(x: Tensor, channels: int, geometry: tuple, out_dtype: torch.dtype) -> Tensor:
    kernel_size, stride, padding, dilation, _, upsample = geometry
    size = conv2d_output_size((x.shape[2], x.shape[3]), kernel_size, stride, padding, dilation, upsample)
    return _channels_last(x, (x.shape[0], channels, *size), out_dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "quantize_static": _fake_quantize_static,
    "quantize_per_token": _fake_quantize_per_token,
    "quantize_per_sample": _fake_quantize_per_sample,
    "group_norm_silu_quantize": _fake_group_norm_silu_quantize,
    "layer_norm_quantize": lambda x, _w, _b, _eps, inv_scale, _s: _fake_producer(x, x.shape[-1], inv_scale),
    "geglu_quantize": lambda x, inv_scale, _s: _fake_producer(x, x.shape[-1] // 2, inv_scale),
    "silu_quantize": lambda x, inv_scale, _s: _fake_producer(x, x.shape[-1], inv_scale),
    "linear_w8a8": lambda x, _xs, _w, scale, _b, _r, dtype: _fake_linear(x, scale.shape[0], dtype),
    "linear_w4a8": lambda x, _xs, _w, _m, scale, _b, _r, dtype: _fake_linear(x, scale.shape[0], dtype),
    "linear_static_w8a8": lambda x, _r, _xs, _w, scale, _b, _res: _fake_linear(x, scale.shape[0], x.dtype),
    "linear_w8a16": lambda x, _w, scale, _b: _fake_linear(x, scale.shape[0], x.dtype),
    "linear_w4a16": lambda x, _w, scale, _b: _fake_linear(x, scale.shape[0], x.dtype),
    "conv2d_w8a8": lambda x, _xs, _w, scale, _b, _v, _r, *rest: _fake_conv2d(x, scale.shape[0], rest[:-1], rest[-1]),
    "conv2d_w4a8": lambda x, _xs, _w, _m, scale, _b, _v, _r, *rest: _fake_conv2d(
        x, scale.shape[0], rest[:-1], rest[-1]
    ),
    "conv2d_w8a16": lambda x, _w, scale, _b, *geometry: _fake_conv2d(x, scale.shape[0], geometry, x.dtype),
}

for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(_name, dispatch.server(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ldmq::{_name}", _FAKES[_name], lib=_LIBRARY)

quantize_static = torch.ops.ldmq.quantize_static
quantize_per_token = torch.ops.ldmq.quantize_per_token
quantize_per_sample = torch.ops.ldmq.quantize_per_sample
group_norm_silu_quantize = torch.ops.ldmq.group_norm_silu_quantize
layer_norm_quantize = torch.ops.ldmq.layer_norm_quantize
geglu_quantize = torch.ops.ldmq.geglu_quantize
silu_quantize = torch.ops.ldmq.silu_quantize
linear_w8a8 = torch.ops.ldmq.linear_w8a8
linear_w4a8 = torch.ops.ldmq.linear_w4a8
linear_static_w8a8 = torch.ops.ldmq.linear_static_w8a8
linear_w8a16 = torch.ops.ldmq.linear_w8a16
linear_w4a16 = torch.ops.ldmq.linear_w4a16
conv2d_w8a8 = torch.ops.ldmq.conv2d_w8a8
conv2d_w4a8 = torch.ops.ldmq.conv2d_w4a8
conv2d_w8a16 = torch.ops.ldmq.conv2d_w8a16
