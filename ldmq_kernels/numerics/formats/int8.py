"""int8 weights in [-127, 127] with one float32 scale for each output channel, and int8 activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats.base import FLOAT_ACTIVATIONS, ActivationFormat, Buffer, Format, WeightFormat
from ldmq_kernels.numerics.formats.rounding import (
    SMALLEST_SCALE,
    check_finite,
    not_positive,
    order_of,
    per_channel,
    rounded,
)
from ldmq_kernels.numerics.gptq import Hessian
from ldmq_kernels.numerics.sums import absmax

INT8_MAX = 127


def _activations(name: str, suffix: str, cost: float, *, is_precise: bool = False) -> ActivationFormat:
    is_rotated = name == "rotated"
    is_calibrated = name != "dynamic" and not is_rotated
    first = "rotate_" if is_rotated else ""
    return ActivationFormat(
        name,
        suffix,
        torch.int8,
        INT8_MAX,
        is_calibrated,
        cost,
        is_precise,
        is_rotated,
        quantize_static="quantize_static" if is_calibrated else "",
        quantize_per_token="" if is_calibrated else first + "quantize_per_token",
        quantize_per_sample="" if is_calibrated else first + "quantize_per_sample",
    )


# a dynamic scale adds a pass over the activations, a rotation another one that no producer takes over, two values make
# two products
INT8_ACTIVATIONS = (
    _activations("static", "-static", 1.0),
    _activations("timestep", "-timestep", 1.0),
    _activations("dynamic", "-dynamic", 1.1, is_precise=True),
    _activations("split", "x2", 2.2, is_precise=True),
    _activations("rotated", "-rotated", 1.2, is_precise=True),
)


def quantize_weight_int8(weight: Tensor, hessian: Hessian | None = None) -> tuple[Tensor, Tensor]:
    """Round to int8 in [-127, 127] with one scale for each output channel, which its largest value sets.

    Args:
        weight: (out, ..., C) floating.
        hessian: for GPTQ rounding, (K, K) float32, K = weight[0].numel(): the sum of x x^T over the layer's inputs;
            or with what the outputs weigh, too.

    Returns:
        integers (out, ..., C) int8, and scale (out,) float32.

    Raises:
        ValueError: the weight or the hessian is not finite, or the hessian does not fit.
    """
    check_finite(weight)
    weight = weight.float()
    scale = (absmax(weight, range(1, weight.dim())) / INT8_MAX).clamp_min(SMALLEST_SCALE)
    return rounded(weight, per_channel(scale, weight), INT8_MAX, order_of(weight, hessian)), scale


class Int8Weight(WeightFormat):
    """int8 with a scale for each output channel: value = weight * weight_scale."""

    is_precise = True

    def buffers(self, shape: Sequence[int]) -> dict[str, Buffer]:
        """The integers, and a scale for each output channel."""
        return {"weight": Buffer(tuple(shape), torch.int8), "weight_scale": Buffer((shape[0],), torch.float32)}

    def quantize(self, weight: Tensor, hessian: Hessian | None = None) -> dict[str, Tensor]:
        """Round as `quantize_weight_int8` does."""
        integers, scale = quantize_weight_int8(weight, hessian)
        return {"weight": integers, "weight_scale": scale}

    def dequantize(self, stored: Mapping[str, Tensor], channels: int) -> Tensor:
        """Integers times the channel's scale."""
        return stored["weight"] * per_channel(stored["weight_scale"], stored["weight"])

    def wrong_values(self, name: str, stored: Tensor) -> tuple[Tensor, str]:
        """-128 is no value of a symmetric grid; scales are finite and positive."""
        if name == "weight":
            return stored == -128, "in [-127, 127]"
        return not_positive(stored)

    def group_scale(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The scale of each output channel, (out,)."""
        return stored["weight_scale"]


INT8_WEIGHT = Int8Weight()
W8A8 = Format(
    "w8a8",
    INT8_WEIGHT,
    INT8_ACTIVATIONS,
    {"linear": "linear_w8a8", "conv2d": "conv2d_w8a8"},
    ("weight_scale",),
    operation_cost=1.0,
    fused_linear="linear_static_w8a8",
    geglu_linear="linear_geglu_w8a8",
    first_token_op="linear_w8a16",
    colours={
        "static": ("#1f6f8b", "#58b0cc"),
        "timestep": ("#3fa7a3", "#74d1c9"),
        "split": ("#7a8f2a", "#b9cc66"),
        "dynamic": ("#d9823b", "#eda464"),
        "rotated": ("#b0543f", "#dd8a76"),
    },
)
W8A16 = Format(
    "w8a16",
    INT8_WEIGHT,
    (FLOAT_ACTIVATIONS,),
    {"linear": "linear_w8a16", "conv2d": "conv2d_w8a16"},
    ("weight_scale",),
    operation_cost=2.1,  # as 16 bit, and the weight is converted
    colours={"float": ("#5b9a5f", "#86c48a")},
)
