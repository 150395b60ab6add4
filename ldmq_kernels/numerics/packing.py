"""Two 4-bit integers to a byte along the last axis: the even index in the low nibble."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(values: Tensor) -> Tensor:
    """Pack integers of [-8, 7] into bytes, two's complement nibbles.

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
    """
    signed = packed.view(torch.int8)
    pairs = torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1)
    return pairs.flatten(-2)[..., :length].contiguous()
