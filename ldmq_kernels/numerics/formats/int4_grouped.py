"""int4 weights with one float32 scale for each output channel and group, for products with 16-bit activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats.base import FLOAT_ACTIVATIONS, Buffer, Format, WeightFormat
from ldmq_kernels.numerics.formats.int4 import (
    GROUP_SIZE,
    INT4_MAX,
    best_steps,
    cached_rows,
    expand_groups,
    group_absmax,
    group_count,
    pack_int4,
    packed_size,
    unpack_int4,
    wrong_nibbles,
)
from ldmq_kernels.numerics.formats.rounding import SMALLEST_SCALE, check_finite, not_positive, order_of, rounded
from ldmq_kernels.numerics.gptq import Hessian

GROUP_SHRINKS = tuple(1 - step / 50 for step in range(21))  # of a group's scale, down to 0.6


def quantize_weight_w4a16(
    weight: Tensor, hessian: Hessian | None = None, group_size: int = GROUP_SIZE
) -> tuple[Tensor, Tensor]:
    """Round to int4 with one float32 scale for each output channel and group.

    Each group takes, of the scales at and below the one that its largest value sets, the one with the
    least error; with a hessian, errors count by their share in the output, and rounding is GPTQ's.

    Args:
        weight: (out, K) floating.
        hessian: (K, K) float32: the sum of x x^T over the layer's inputs.

    Returns:
        integers (out, K) int8 in [-7, 7], and scale (out, groups) float32.

    Raises:
        ValueError: the weight or the hessian is not finite, or the hessian does not fit.
    """
    check_finite(weight)
    weight = weight.float()
    channels = weight.shape[-1]
    inputs = order_of(weight, hessian)
    largest = (group_absmax(weight, group_size) / INT4_MAX).clamp_min(SMALLEST_SCALE)
    on_grid = weight / expand_groups(largest, channels, group_size)
    shrinks = [best_steps(rows, GROUP_SHRINKS, inputs, group_size)[0] for rows in cached_rows(on_grid)]
    scale = (largest * torch.cat(shrinks)).clamp_min(SMALLEST_SCALE)
    return rounded(weight, expand_groups(scale, channels, group_size), INT4_MAX, inputs), scale


class GroupedInt4Weight(WeightFormat):
    """int4 with a scale for each output channel and group: value = weight * group_scale."""

    is_coarse = True

    def buffers(self, shape: Sequence[int]) -> dict[str, Buffer]:
        """Two integers to a byte, and a scale for each group."""
        return {
            "weight": Buffer((*shape[:-1], packed_size(shape[-1])), torch.uint8),
            "group_scale": Buffer((*shape[:-1], group_count(shape[-1])), torch.float32),
        }

    def quantize(self, weight: Tensor, hessian: Hessian | None = None) -> dict[str, Tensor]:
        """Round as `quantize_weight_w4a16` does."""
        integers, scale = quantize_weight_w4a16(weight, hessian)
        return {"weight": pack_int4(integers), "group_scale": scale}

    def dequantize(self, stored: Mapping[str, Tensor], channels: int) -> Tensor:
        """Integers times their group's scale."""
        return unpack_int4(stored["weight"], channels) * expand_groups(stored["group_scale"], channels)

    def wrong_values(self, name: str, stored: Tensor) -> tuple[Tensor, str]:
        """Integers of a symmetric grid, finite and positive scales."""
        return wrong_nibbles(stored) if name == "weight" else not_positive(stored)


W4A16 = Format(
    "w4a16",
    GroupedInt4Weight(),
    (FLOAT_ACTIVATIONS,),
    {"linear": "linear_w4a16"},
    ("group_scale",),
    operation_cost=2.1,  # as 16 bit, and the weight is converted
    colours={"float": ("#9a7b3f", "#c9ab6c")},
)
