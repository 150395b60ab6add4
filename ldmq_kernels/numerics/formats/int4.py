"""What the int4 formats share: two integers to a byte, groups along the input channels, the search for their scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmq_kernels.numerics.gptq import RoundingOrder

GROUP_SIZE = 64
INT4_MAX = 7
ERROR_POWER = 3  # 2 clips more: the weights come nearer, but the output of a UNet loses up to 1 dB of SQNR
SEARCHED_AT_ONCE = 1 << 18  # values whose scales are searched together: 1 MiB


def pack_int4(values: Tensor) -> Tensor:
    """Pack integers of [-8, 7] into bytes, two's complement nibbles, the even index in the low one.

    Args:
        values: (..., K) int8.

    Returns:
        (..., ceil(K / 2)) uint8; the last high nibble is zero where K is odd.
    """
    low, high = values[..., 0::2], values[..., 1::2]
    if low.shape[-1] != high.shape[-1]:
        high = torch.nn.functional.pad(high, (0, 1))
    return ((low & 0xF) | ((high & 0xF) << 4)).view(torch.uint8).contiguous()


def unpack_int4(packed: Tensor, length: int) -> Tensor:
    """The integers that `pack_int4` packed.

    Args:
        packed: (..., ceil(length / 2)) uint8.
        length: size of the last axis before packing.

    Returns:
        (..., length) int8 in [-8, 7].

    Raises:
        ValueError: the bytes hold another number of values.
    """
    if packed.shape[-1] != packed_size(length):
        raise ValueError(f"rows of {packed.shape[-1]} bytes do not hold {length} int4 values each")
    signed = packed.view(torch.int8)
    pairs = torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1)
    return pairs.flatten(-2)[..., :length].contiguous()


def packed_size(channels: int) -> int:
    """Bytes of a row of `channels` int4 values."""
    return -(-channels // 2)


def wrong_nibbles(packed: Tensor) -> tuple[Tensor, str]:
    """Where a byte holds -8, which is no value of a symmetric grid, and what is accepted."""
    return ((packed & 0xF) == 8) | ((packed >> 4) == 8), "a pair of int4 in [-7, 7]"


def group_count(channels: int, group_size: int = GROUP_SIZE) -> int:
    """Groups along `channels` input channels; the last may be short."""
    return -(-channels // group_size)


def expand_groups(groups: Tensor, channels: int, group_size: int = GROUP_SIZE) -> Tensor:
    """(..., groups) to (..., channels), each value repeated over its group."""
    return groups.repeat_interleave(group_size, dim=-1)[..., :channels]


def group_absmax(weight: Tensor, group_size: int) -> Tensor:
    """The largest absolute value of each group: (..., C) to (..., groups)."""
    short = -weight.shape[-1] % group_size
    padded = torch.nn.functional.pad(weight.abs(), (0, short))
    return padded.unflatten(-1, (-1, group_size)).amax(-1)


def _group_sum(values: Tensor, group_size: int) -> Tensor:
    short = -values.shape[-1] % group_size
    return torch.nn.functional.pad(values, (0, short)).unflatten(-1, (-1, group_size)).sum(-1)


def cached_rows(weight: Tensor) -> tuple[Tensor, ...]:
    """The weight a few channels at a time, which a search that passes over them many times keeps in cache."""
    return weight.split(max(1, SEARCHED_AT_ONCE // weight[0].numel()))


def best_steps(
    on_grid: Tensor, candidates: Sequence[float], inputs: RoundingOrder | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """Of the candidates, each group's step of least error when rounded to nearest, and that error.

    The error is sum |difference|^ERROR_POWER, counted by the importance of the inputs where they are known.
    Both are (out, ..., groups) float32; of equals the first is taken.
    """
    least = torch.full_like(group_absmax(on_grid, group_size), torch.inf)
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
