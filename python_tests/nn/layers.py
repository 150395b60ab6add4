"""What the tests of both layers share: float layers, their quantized forms, and the op's definition of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldmq_kernels.nn import QuantConv2d, QuantizedLayer, QuantLinear, quantized_class
from ldmq_kernels.nn.kinds import FloatLayer
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.numerics.formats.int4 import expand_groups, unpack_int4
from ldmq_kernels.numerics.formats.int4_two_level import fold_multiplier
from ldmq_kernels.numerics.hadamard import rotate

LINEAR_SCHEMES = [name for name, s in SCHEMES.items() if s.quantizes and not s.is_split]
EIGHT_BIT_SCHEMES = [name for name in LINEAR_SCHEMES if SCHEMES[name].quantizes_activations]
SMOOTHED_OR_NOT = [
    (name, smooth) for name in LINEAR_SCHEMES for smooth in (False, True) if name in EIGHT_BIT_SCHEMES or not smooth
]
SQNR_FLOOR_DB = {"w8a8": 35.0, "fp8": 26.0, "w8a16": 40.0, "w4a8": 15.0, "w4a16": 18.0}
CONV_SCHEMES = [name for name in LINEAR_SCHEMES if "conv2d" in SCHEMES[name].format.layers]


def quantized(layer: FloatLayer, scheme: str, *, smooth: bool = False, scale: float = 0.02) -> QuantizedLayer:
    """The layer quantized, by default with an input scale that standard normal inputs overrun now and then."""
    kind = quantized_class(layer)
    channels = layer.weight.shape[1]
    smoothing = torch.exp2(torch.arange(channels) % 3 - 1.0) if smooth else None
    input_scale = torch.tensor([scale]) if SCHEMES[scheme].is_static else None
    return kind.from_float(layer.eval(), SCHEMES[scheme], input_scale=input_scale, smoothing=smoothing)


def dequantized_weight(layer: QuantLinear | QuantConv2d) -> Tensor:
    """The float64 weight, channels last, that the stored integers and scales stand for, still smoothed and rotated."""
    stored = layer.state_dict()
    weight, four_bit = stored["weight"], stored["weight"].dtype == torch.uint8
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels // layer.groups
    if four_bit:
        weight = unpack_int4(weight, channels)
    if "group_scale" in stored:
        return weight.double() * expand_groups(stored["group_scale"], channels)
    if "multiplier" in stored:
        weight = fold_multiplier(weight, stored["multiplier"])
    return weight.double() * stored["weight_scale"].view(-1, *[1] * (weight.dim() - 1))


def dequantized_input(
    layer: QuantLinear | QuantConv2d, x: Tensor, channel_dim: int, amax_dims: tuple[int, ...]
) -> Tensor:
    """The float64 input that the layer multiplies: smoothed, rotated, rounded; or as it is for 16-bit activations."""
    if not layer.scheme.quantizes_activations:
        return x.double()
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    smoothed = x.float() if layer.smoothing is None else x.float() * layer.smoothing.view(shape)
    if layer.scheme.is_static:
        inv_scale = layer.input_inv_scale if layer.smoothing is None else layer.input_inv_scale.view(shape)
        return rounded_input(layer, x.float() * inv_scale) * layer.input_scale.double()
    if layer.scheme.is_rotated:
        smoothed = rotate(smoothed.movedim(channel_dim, -1)).movedim(-1, channel_dim)
    scale = smoothed.abs().amax(amax_dims, keepdim=True) / layer.scheme.activations.largest
    return rounded_input(layer, smoothed * (1 / scale)) * scale.double()


def rounded_input(layer: QuantLinear | QuantConv2d, y: Tensor) -> Tensor:
    """Float32 values as the layer's activations hold them, in float64."""
    clamped = y.clamp(-layer.scheme.activations.largest, layer.scheme.activations.largest)
    if layer.scheme.activations.dtype == torch.int8:
        return torch.round(clamped).double()
    return clamped.to(layer.scheme.activations.dtype).double()
