"""Hadamard rotation of channels: what is large in one of them is spread over a block, and rounds more finely.

A linear computes W x = (W H' / size) (H x). H is block diagonal; a block is a Hadamard matrix of 1 and -1 whose columns
have the signs of the Rudin-Shapiro sequence, so that a value that all channels share is spread as well: of 32 equal
channels no sum is above 8. H' H = size goes to the weight as a power of two, and a scale that is measured takes H's
growth. Sources: QuaRot, arXiv 2404.00456; ConvRot, arXiv 2512.03673.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.numerics.sums import row_blocks

LARGEST_BLOCK = 32  # larger ones were no better in the study, and some widths of UNets are 3 * 32


def block_size(channels: int) -> int:
    """Channels that are rotated together: the largest power of two up to 32 that divides their number."""
    return min(channels & -channels, LARGEST_BLOCK) if channels else 1


def signs(channels: int, device: torch.device | None = None) -> Tensor:
    """(channels,) int8, 1 or -1: minus where the number in the block has an odd count of pairs of ones in binary."""
    index = torch.arange(channels, device=device) % block_size(channels)
    pairs = index & (index >> 1)
    odd = pairs ^ (pairs >> 1) ^ (pairs >> 2) ^ (pairs >> 3)
    return (1 - 2 * (odd & 1)).to(torch.int8)


def rotate(x: Tensor) -> Tensor:
    """H x over the last axis, in x's dtype.

    Sums are made in pairs: of channels whose numbers in a block differ in the lowest bit first, then in the next one.
    Every backend adds in this order, so float32 results are the same to the bit.

    Args:
        x: (..., C) floating.

    Returns:
        (..., C), contiguous.
    """
    return _summed(x * signs(x.shape[-1], x.device))


def unrotate(x: Tensor) -> Tensor:
    """H' x over the last axis: what `rotate` gave, times the block's size."""
    return _summed(x) * signs(x.shape[-1], x.device)


def rotated_weight(weight: Tensor) -> Tensor:
    """W H' / size of a weight (..., C) float32, whose product with a rotated input is the layer's; see `unrotate`."""
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows, rotated in zip(row_blocks(weight), row_blocks(out), strict=True):
        torch.mul(rotate(rows), 1 / block_size(weight.shape[-1]), out=rotated)
    return out


def rotated_hessian(hessian: Tensor, channels: int) -> Tensor:
    """The second moments (K, K) of a layer's inputs as they are when each position's `channels` are rotated."""
    columns = rotate(hessian.unflatten(1, (-1, channels))).flatten(1)
    return rotate(columns.t().unflatten(1, (-1, channels))).flatten(1).t().contiguous()


def _summed(x: Tensor) -> Tensor:
    shape, size = x.shape, block_size(x.shape[-1])
    for _ in range(size.bit_length() - 1):  # each round moves the bit that it has summed over to the top
        pairs = x.reshape(*shape[:-1], shape[-1] // size, size // 2, 2)
        even, odd = pairs.unbind(-1)
        x = torch.stack((even + odd, even - odd), -2)
    return x.reshape(shape).contiguous()
