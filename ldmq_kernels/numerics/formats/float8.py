"""FP8: float8 e4m3 weights with one float32 scale for each output channel, and e4m3 activations.

e4m3 has 3 bits of mantissa, so that a value is off by up to 2^-4 of itself, whatever the range is; its largest value is
448, it has NaN and no infinity. Below 2^-6 its values are subnormal, in steps of 2^-9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats.base import ActivationFormat, Buffer, Format, WeightFormat
from ldmq_kernels.numerics.formats.rounding import (
    SMALLEST_SCALE,
    check_finite,
    not_positive,
    order_of,
    per_channel,
    rounded_on_grid,
)
from ldmq_kernels.numerics.gptq import Hessian

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0


def round_to_float8(y: Tensor) -> Tensor:
    """Clamp to [-448, 448] and round to e4m3, half to even; NaN stays NaN. Overwrites y, float32."""
    return y.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


class Float8Weight(WeightFormat):
    """float8 e4m3 with a scale for each output channel, which its largest value sets: value = weight * weight_scale."""

    def buffers(self, shape: Sequence[int]) -> dict[str, Buffer]:
        """The values, and a scale for each output channel."""
        return {"weight": Buffer(tuple(shape), FLOAT8), "weight_scale": Buffer((shape[0],), torch.float32)}

    def quantize(self, weight: Tensor, hessian: Hessian | None = None) -> dict[str, Tensor]:
        """Round to the nearest values or, with a hessian, as GPTQ does on the grid of e4m3."""
        check_finite(weight)
        weight = weight.float()
        scale = (weight.flatten(1).abs().amax(1) / FLOAT8_MAX).clamp_min(SMALLEST_SCALE)
        steps, inputs = per_channel(scale, weight), order_of(weight, hessian)
        # a rounded value is exact in float32 and in e4m3
        on_grid = rounded_on_grid(weight, steps, lambda value: round_to_float8(value).float(), inputs)
        return {"weight": on_grid.to(FLOAT8), "weight_scale": scale}

    def dequantize(self, stored: Mapping[str, Tensor], channels: int) -> Tensor:
        """Values times the channel's scale."""
        return stored["weight"].float() * per_channel(stored["weight_scale"], stored["weight"])

    def wrong_values(self, name: str, stored: Tensor) -> tuple[Tensor, str]:
        """No weight is NaN; scales are finite and positive."""
        if name == "weight":
            return stored.float().isnan(), "finite"
        return not_positive(stored)


def _activations(name: str, cost: float) -> ActivationFormat:
    is_calibrated = name == "static"
    return ActivationFormat(
        name,
        f"-{name}",
        FLOAT8,
        FLOAT8_MAX,
        is_calibrated,
        cost,
        quantize_static="quantize_static" if is_calibrated else "",
        quantize_per_token="" if is_calibrated else "quantize_per_token",
        quantize_per_sample="" if is_calibrated else "quantize_per_sample",
    )


# no rotation and no scale for each group of timesteps: the error is relative to each value, so a narrower range gains
# little
FP8 = Format(
    "fp8",
    Float8Weight(),
    (_activations("static", 1.0), _activations("dynamic", 1.1)),
    {"linear": "linear_fp8", "conv2d": "conv2d_fp8"},
    ("weight_scale",),
    operation_cost=1.0,
    geglu_linear="linear_geglu_fp8",
    colours={"static": ("#3f5fb8", "#8aa4ec"), "dynamic": ("#5f86d8", "#a9c2f6")},
)
