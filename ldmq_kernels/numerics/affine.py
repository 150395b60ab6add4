"""Symmetric quantization of weights: int8 per channel, int4 in groups along the input channels.

A weight is (out, C) or, for a convolution, (out, R, S, C). All scales are float32 and positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats import GROUP_SIZE

INT8_MAX = 127
INT4_MAX = 7
MULTIPLIER_MAX = 18  # 7 * 18 = 126 still fits int8
SMALLEST_SCALE = 1e-30  # of an all-zero channel, whose integers are all zero


@dataclass(frozen=True)
class GroupedWeight:
    """int4 weight whose groups share an int8 grid per channel: value = integers * multiplier * scale.

    integers: (out, ..., C) int8 in [-7, 7]; multiplier: (out, ..., groups) uint8 in 1..18; scale: (out,) float32.
    """

    integers: Tensor
    multiplier: Tensor
    scale: Tensor


def _check_finite(weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinite values, which cannot be quantized")


def _per_channel(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.dim() - 1))


def quantize_weight_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to int8 in [-127, 127] with one scale for each output channel.

    Args:
        weight: (out, ..., C) floating.

    Returns:
        integers (out, ..., C) int8, and scale (out,) float32.

    Raises:
        ValueError: the weight is not finite.
    """
    _check_finite(weight)
    weight = weight.float()
    scale = (weight.flatten(1).abs().amax(1) / INT8_MAX).clamp_min(SMALLEST_SCALE)
    integers = torch.round(weight / _per_channel(scale, weight)).clamp_(-INT8_MAX, INT8_MAX)
    return integers.to(torch.int8), scale


def group_count(channels: int, group_size: int = GROUP_SIZE) -> int:
    """Groups along `channels` input channels; the last may be short."""
    return -(-channels // group_size)


def expand_groups(groups: Tensor, channels: int, group_size: int = GROUP_SIZE) -> Tensor:
    """(..., groups) to (..., channels), each value repeated over its group."""
    return groups.repeat_interleave(group_size, dim=-1)[..., :channels]


def _group_absmax(weight: Tensor, group_size: int) -> Tensor:
    short = -weight.shape[-1] % group_size
    padded = torch.nn.functional.pad(weight.abs(), (0, short))
    return padded.unflatten(-1, (-1, group_size)).amax(-1)


def _group_sum(values: Tensor, group_size: int) -> Tensor:
    short = -values.shape[-1] % group_size
    return torch.nn.functional.pad(values, (0, short)).unflatten(-1, (-1, group_size)).sum(-1)


def quantize_weight_w4a8(weight: Tensor, group_size: int = GROUP_SIZE) -> GroupedWeight:
    """Round to int4 in two levels, so that integers * multiplier is an exact int8.

    Each group takes, of the multipliers near its largest value, the one with the least squared error.

    Raises:
        ValueError: the weight is not finite.
    """
    _check_finite(weight)
    weight = weight.float()
    channels = weight.shape[-1]
    scale = (weight.flatten(1).abs().amax(1) / (INT4_MAX * MULTIPLIER_MAX)).clamp_min(SMALLEST_SCALE)
    on_grid = weight / _per_channel(scale, weight)
    ideal = _group_absmax(on_grid, group_size) / INT4_MAX
    best = torch.ones_like(ideal)
    best_error = torch.full_like(ideal, torch.inf)
    for shrink in (1.0, 0.92, 0.84, 0.76):
        for candidate in (torch.floor(ideal * shrink), torch.ceil(ideal * shrink)):
            candidate = candidate.clamp_(1, MULTIPLIER_MAX)
            step = expand_groups(candidate, channels, group_size)
            rounded = torch.round(on_grid / step).clamp_(-INT4_MAX, INT4_MAX) * step
            error = _group_sum((rounded - on_grid).square(), group_size)
            better = error < best_error
            best, best_error = torch.where(better, candidate, best), torch.where(better, error, best_error)
    step = expand_groups(best, channels, group_size)
    integers = torch.round(on_grid / step).clamp_(-INT4_MAX, INT4_MAX).to(torch.int8)
    return GroupedWeight(integers, best.to(torch.uint8), scale)


def fold_multiplier(integers: Tensor, multiplier: Tensor, group_size: int = GROUP_SIZE) -> Tensor:
    """The int8 weight that int4 integers and their group multipliers stand for."""
    return integers * expand_groups(multiplier, integers.shape[-1], group_size).to(torch.int8)


def quantize_weight_w4a16(weight: Tensor, group_size: int = GROUP_SIZE) -> tuple[Tensor, Tensor]:
    """Round to int4 with one float32 scale for each output channel and group.

    Args:
        weight: (out, K) floating.

    Returns:
        integers (out, K) int8 in [-7, 7], and scale (out, groups) float32.

    Raises:
        ValueError: the weight is not finite.
    """
    _check_finite(weight)
    weight = weight.float()
    scale = (_group_absmax(weight, group_size) / INT4_MAX).clamp_min(SMALLEST_SCALE)
    steps = expand_groups(scale, weight.shape[-1], group_size)
    return torch.round(weight / steps).clamp_(-INT4_MAX, INT4_MAX).to(torch.int8), scale


def divide_multiplier(folded: Tensor, multiplier: Tensor, group_size: int = GROUP_SIZE) -> Tensor:
    """The int4 integers that `fold_multiplier` multiplied."""
    steps = expand_groups(multiplier, folded.shape[-1], group_size).to(torch.int8)
    return torch.div(folded, steps, rounding_mode="trunc")
