"""int4 weights in two levels: int4 x an integer multiplier of its group is an exact int8, x a scale of its channel.

The main loop of a product with int8 activations so stays in one int32 accumulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats.base import Buffer, Format, WeightFormat
from ldmq_kernels.numerics.formats.int4 import (
    ERROR_POWER,
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
from ldmq_kernels.numerics.formats.int8 import INT8_ACTIVATIONS
from ldmq_kernels.numerics.formats.rounding import (
    SMALLEST_SCALE,
    check_finite,
    not_positive,
    order_of,
    per_channel,
    rounded,
)
from ldmq_kernels.numerics.gptq import Hessian, RoundingOrder

MULTIPLIER_MAX = 18  # 7 * 18 = 126 still fits int8
CHANNEL_SHRINKS = (1.0, 0.9, 0.8)  # of a channel's scale


@dataclass(frozen=True)
class GroupedWeight:
    """int4 weight whose groups share an int8 grid per channel: value = integers * multiplier * scale.

    integers: (out, ..., C) int8 in [-7, 7]; multiplier: (out, ..., groups) uint8 in 1..18; scale: (out,) float32.
    """

    integers: Tensor
    multiplier: Tensor
    scale: Tensor


def quantize_weight_w4a8(weight: Tensor, hessian: Hessian | None = None, group_size: int = GROUP_SIZE) -> GroupedWeight:
    """Round to int4 in two levels, so that integers * multiplier is an exact int8.

    Each channel takes, of a few scales, and each of its groups, of all multipliers, the one with the
    least error; with a hessian, errors count by their share in the output, and rounding is GPTQ's.

    Args:
        weight: (out, ..., C) floating.
        hessian: (K, K) float32, K = weight[0].numel(): the sum of x x^T over the layer's inputs.

    Raises:
        ValueError: the weight or the hessian is not finite, or the hessian does not fit.
    """
    check_finite(weight)
    weight = weight.float()
    inputs = order_of(weight, hessian)
    found = [_two_level_scales(rows, inputs, group_size) for rows in cached_rows(weight)]
    scale, multiplier = (torch.cat(parts) for parts in zip(*found, strict=True))
    steps = expand_groups(multiplier, weight.shape[-1], group_size) * per_channel(scale, weight)
    return GroupedWeight(rounded(weight, steps, INT4_MAX, inputs), multiplier.to(torch.uint8), scale)


def _two_level_scales(weight: Tensor, inputs: RoundingOrder | None, group_size: int) -> tuple[Tensor, Tensor]:
    """The scale of each channel, (out,), and the multiplier of each group, as a float."""
    largest = (weight.flatten(1).abs().amax(1) / (INT4_MAX * MULTIPLIER_MAX)).clamp_min(SMALLEST_SCALE)
    scale, least = largest, torch.full_like(largest, torch.inf)
    multiplier = torch.ones_like(group_absmax(weight, group_size))
    for shrink in CHANNEL_SHRINKS:
        tried = largest * shrink
        on_grid = weight / per_channel(tried, weight)
        multipliers, errors = best_steps(on_grid, range(1, MULTIPLIER_MAX + 1), inputs, group_size)
        error = errors.flatten(1).sum(1) * shrink**ERROR_POWER
        better = error < least
        scale, least = torch.where(better, tried, scale), torch.minimum(error, least)
        multiplier = torch.where(per_channel(better, weight), multipliers, multiplier)
    return scale, multiplier


def fold_multiplier(integers: Tensor, multiplier: Tensor, group_size: int = GROUP_SIZE) -> Tensor:
    """The int8 weight that int4 integers and their group multipliers stand for."""
    return integers * expand_groups(multiplier, integers.shape[-1], group_size).to(torch.int8)


def divide_multiplier(folded: Tensor, multiplier: Tensor, group_size: int = GROUP_SIZE) -> Tensor:
    """The int4 integers that `fold_multiplier` multiplied."""
    steps = expand_groups(multiplier, folded.shape[-1], group_size).to(torch.int8)
    return torch.div(folded, steps, rounding_mode="trunc")


class TwoLevelInt4Weight(WeightFormat):
    """int4 in groups that share an int8 grid per channel: value = weight * multiplier * weight_scale."""

    is_coarse = True
    channel_groups = GROUP_SIZE

    def buffers(self, shape: Sequence[int]) -> dict[str, Buffer]:
        """Two integers to a byte, a multiplier for each group, and a scale for each output channel."""
        return {
            "weight": Buffer((*shape[:-1], packed_size(shape[-1])), torch.uint8),
            "multiplier": Buffer((*shape[:-1], group_count(shape[-1])), torch.uint8),
            "weight_scale": Buffer((shape[0],), torch.float32),
        }

    def quantize(self, weight: Tensor, hessian: Hessian | None = None) -> dict[str, Tensor]:
        """Round as `quantize_weight_w4a8` does."""
        made = quantize_weight_w4a8(weight, hessian)
        return {"weight": pack_int4(made.integers), "multiplier": made.multiplier, "weight_scale": made.scale}

    def dequantize(self, stored: Mapping[str, Tensor], channels: int) -> Tensor:
        """The int8 weight that multiplied integers are, times the channel's scale."""
        weight = fold_multiplier(unpack_int4(stored["weight"], channels), stored["multiplier"])
        return weight * per_channel(stored["weight_scale"], weight)

    def wrong_values(self, name: str, stored: Tensor) -> tuple[Tensor, str]:
        """Integers of a symmetric grid, multipliers whose products fit int8, finite and positive scales."""
        if name == "weight":
            return wrong_nibbles(stored)
        if name == "multiplier":
            return (stored < 1) | (stored > MULTIPLIER_MAX), f"in 1..{MULTIPLIER_MAX}"
        return not_positive(stored)

    def group_scale(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The scale of each group, (out, groups), of a linear."""
        return stored["weight_scale"][:, None] * stored["multiplier"]


W4A8 = Format(
    "w4a8",
    TwoLevelInt4Weight(),
    INT8_ACTIVATIONS,
    {"linear": "linear_w4a8", "conv2d": "conv2d_w4a8"},
    ("multiplier", "weight_scale"),
    operation_cost=1.0,
    first_token_op="linear_w4a16",
    like="w8a8",
    colours={
        "static": ("#8a5fb0", "#b491d6"),
        "timestep": ("#a06fd0", "#c4a4ea"),
        "split": ("#6b5b95", "#a79bd0"),
        "dynamic": ("#c25b86", "#e28bb0"),
        "rotated": ("#9c4a5e", "#d08396"),
    },
)
