"""Symmetric quantization of weights: int8 per channel, int4 in groups along the input channels.

A weight is (out, C) or, for a convolution, (out, R, S, C). All scales are float32 and positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats import GROUP_SIZE
from ldmq_kernels.numerics.gptq import RoundingOrder, gptq_round, rounding_order

INT8_MAX = 127
INT4_MAX = 7
MULTIPLIER_MAX = 18  # 7 * 18 = 126 still fits int8
SMALLEST_SCALE = 1e-30  # of an all-zero channel, whose integers are all zero
GROUP_SHRINKS = tuple(1 - step / 50 for step in range(21))  # of a w4a16 scale, down to 0.6
CHANNEL_SHRINKS = (1.0, 0.9, 0.8)  # of a w4a8 channel's scale
ERROR_POWER = 3  # 2 clips more: the weights come nearer, but the output of a UNet loses up to 1 dB of SQNR
SEARCHED_AT_ONCE = 1 << 18  # values whose scales are searched together: 1 MiB


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


def _inputs(weight: Tensor, hessian: Tensor | None) -> RoundingOrder | None:
    return None if hessian is None else rounding_order(hessian, weight[0].numel())


def _rounded(weight: Tensor, steps: Tensor, largest: int, inputs: RoundingOrder | None) -> Tensor:
    """int8 integers of a weight on the grid of steps: to nearest or, where the inputs are known, as GPTQ does."""
    if inputs is None:
        return torch.round(weight / steps).clamp_(-largest, largest).to(torch.int8)
    flat_steps = steps.expand_as(weight).flatten(1)
    return gptq_round(weight.flatten(1), flat_steps, largest, inputs).view_as(weight)


def quantize_weight_int8(weight: Tensor, hessian: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round to int8 in [-127, 127] with one scale for each output channel, which its largest value sets.

    Args:
        weight: (out, ..., C) floating.
        hessian: (K, K) float32, K = weight[0].numel(): the sum of x x^T over the layer's inputs, for GPTQ rounding.

    Returns:
        integers (out, ..., C) int8, and scale (out,) float32.

    Raises:
        ValueError: the weight or the hessian is not finite, or the hessian does not fit.
    """
    _check_finite(weight)
    weight = weight.float()
    scale = (weight.flatten(1).abs().amax(1) / INT8_MAX).clamp_min(SMALLEST_SCALE)
    return _rounded(weight, _per_channel(scale, weight), INT8_MAX, _inputs(weight, hessian)), scale


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


def _cached_rows(weight: Tensor) -> tuple[Tensor, ...]:
    """The weight a few channels at a time, which a search that passes over them many times keeps in cache."""
    return weight.split(max(1, SEARCHED_AT_ONCE // weight[0].numel()))


def _best_steps(
    on_grid: Tensor, candidates: Sequence[float], inputs: RoundingOrder | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """Of the candidates, each group's step of least error when rounded to nearest, and that error.

    The error is sum |difference|^ERROR_POWER, counted by the importance of the inputs where they are known.
    Both are (out, ..., groups) float32; of equals the first is taken.
    """
    least = torch.full_like(_group_absmax(on_grid, group_size), torch.inf)
    best = torch.empty_like(least)
    for step in candidates:
        error = torch.round(on_grid / step).clamp_(-INT4_MAX, INT4_MAX).mul_(step).sub_(on_grid)
        error = error.abs_().pow_(ERROR_POWER)
        if inputs is not None:
            error *= inputs.importance.view(on_grid.shape[1:])
        error = _group_sum(error, group_size)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best, least


def quantize_weight_w4a8(weight: Tensor, hessian: Tensor | None = None, group_size: int = GROUP_SIZE) -> GroupedWeight:
    """Round to int4 in two levels, so that integers * multiplier is an exact int8.

    Each channel takes, of a few scales, and each of its groups, of all multipliers, the one with the
    least error; with a hessian, errors count by their share in the output, and rounding is GPTQ's.

    Args:
        weight: (out, ..., C) floating.
        hessian: (K, K) float32, K = weight[0].numel(): the sum of x x^T over the layer's inputs.

    Raises:
        ValueError: the weight or the hessian is not finite, or the hessian does not fit.
    """
    _check_finite(weight)
    weight = weight.float()
    inputs = _inputs(weight, hessian)
    found = [_two_level_scales(rows, inputs, group_size) for rows in _cached_rows(weight)]
    scale, multiplier = (torch.cat(parts) for parts in zip(*found, strict=True))
    steps = expand_groups(multiplier, weight.shape[-1], group_size) * _per_channel(scale, weight)
    return GroupedWeight(_rounded(weight, steps, INT4_MAX, inputs), multiplier.to(torch.uint8), scale)


def _two_level_scales(weight: Tensor, inputs: RoundingOrder | None, group_size: int) -> tuple[Tensor, Tensor]:
    """The scale of each channel, (out,), and the multiplier of each group, as a float."""
    largest = (weight.flatten(1).abs().amax(1) / (INT4_MAX * MULTIPLIER_MAX)).clamp_min(SMALLEST_SCALE)
    scale, least = largest, torch.full_like(largest, torch.inf)
    multiplier = torch.ones_like(_group_absmax(weight, group_size))
    for shrink in CHANNEL_SHRINKS:
        tried = largest * shrink
        on_grid = weight / _per_channel(tried, weight)
        multipliers, errors = _best_steps(on_grid, range(1, MULTIPLIER_MAX + 1), inputs, group_size)
        error = errors.flatten(1).sum(1) * shrink**ERROR_POWER
        better = error < least
        scale, least = torch.where(better, tried, scale), torch.minimum(error, least)
        multiplier = torch.where(_per_channel(better, weight), multipliers, multiplier)
    return scale, multiplier


def fold_multiplier(integers: Tensor, multiplier: Tensor, group_size: int = GROUP_SIZE) -> Tensor:
    """The int8 weight that int4 integers and their group multipliers stand for."""
    return integers * expand_groups(multiplier, integers.shape[-1], group_size).to(torch.int8)


def quantize_weight_w4a16(
    weight: Tensor, hessian: Tensor | None = None, group_size: int = GROUP_SIZE
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
    _check_finite(weight)
    weight = weight.float()
    channels = weight.shape[-1]
    inputs = _inputs(weight, hessian)
    largest = (_group_absmax(weight, group_size) / INT4_MAX).clamp_min(SMALLEST_SCALE)
    on_grid = weight / expand_groups(largest, channels, group_size)
    shrinks = [_best_steps(rows, GROUP_SHRINKS, inputs, group_size)[0] for rows in _cached_rows(on_grid)]
    scale = (largest * torch.cat(shrinks)).clamp_min(SMALLEST_SCALE)
    return _rounded(weight, expand_groups(scale, channels, group_size), INT4_MAX, inputs), scale


def divide_multiplier(folded: Tensor, multiplier: Tensor, group_size: int = GROUP_SIZE) -> Tensor:
    """The int4 integers that `fold_multiplier` multiplied."""
    steps = expand_groups(multiplier, folded.shape[-1], group_size).to(torch.int8)
    return torch.div(folded, steps, rounding_mode="trunc")
