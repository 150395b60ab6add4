"""Products in float32, on weights widened once: exact ones of int8 where its instructions saturate, and those of FP8.

float32 holds every integer up to 2**24. Where the products of a weight's output channel with the largest activations
could add up to more, its input channels are cut into equal parts, whose sums are exact, and these are added.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats.float8 import FLOAT8

LARGEST_EXACT = 1 << 24
LARGEST_ACTIVATION = 127


@functools.cache
def is_built_in() -> bool:
    """Whether this torch has oneDNN's float products on weights that are laid out before."""
    names = ("_convolution_pointwise", "_reorder_convolution_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def parts_of(weight: Tensor) -> int:
    """How many parts the input channels of (N, ..., C) int8 have: the fewest whose sums of products are exact."""
    channels = weight.shape[-1]
    sizes = weight.abs().flatten(1, -2).sum(1, dtype=torch.int32) if weight.dim() > 2 else weight.abs().int()
    for parts in range(1, channels):
        if channels % parts == 0:
            largest = sizes.view(-1, parts, channels // parts).sum(2).max()
            if int(largest) * LARGEST_ACTIVATION <= LARGEST_EXACT:
                return parts
    return channels


def pack_linear(weight: Tensor) -> Tensor:
    """(N, K) int8 to (parts, N, K / parts) float32."""
    parts = parts_of(weight)
    return weight.float().unflatten(1, (parts, -1)).transpose(0, 1).contiguous()


def unpack_linear(packed: Tensor) -> Tensor:
    """The (N, K) int8 that `pack_linear` packed."""
    return packed.transpose(0, 1).flatten(1).to(torch.int8, memory_format=torch.contiguous_format)


def pack_conv2d(weight: Tensor) -> Tensor:
    """(K, R, S, C / groups) int8 to (parts * K, C / groups / parts, R, S) float32, opaque, in plain order.

    All output channels of the first part come first: a convolution of as many groups as there are parts.
    """
    parts = parts_of(weight)
    by_part = weight.float().unflatten(3, (parts, -1)).permute(3, 0, 4, 1, 2)
    return by_part.flatten(0, 1).contiguous().to_mkldnn()


def unpack_conv2d(packed: Tensor, outputs: int) -> Tensor:
    """The (K, R, S, C / groups) int8 that `pack_conv2d` packed, whatever its layout is by now; `outputs` is K."""
    by_part = packed.to_dense().unflatten(0, (-1, outputs))
    return by_part.permute(1, 3, 4, 0, 2).flatten(3).to(torch.int8, memory_format=torch.contiguous_format)


def pack_linear_float8(weight: Tensor) -> Tensor:
    """(N, K) e4m3 to (1, N, K) float32: one part, whose sums are float32's."""
    return weight.float()[None].contiguous()


def unpack_linear_float8(packed: Tensor) -> Tensor:
    """The (N, K) e4m3 that `pack_linear_float8` packed."""
    return packed[0].to(FLOAT8)


def pack_conv2d_float8(weight: Tensor) -> Tensor:
    """(K, R, S, C / groups) e4m3 to (K, C / groups, R, S) float32, opaque, in plain order."""
    return weight.float().permute(0, 3, 1, 2).contiguous().to_mkldnn()


def unpack_conv2d_float8(packed: Tensor) -> Tensor:
    """The (K, R, S, C / groups) e4m3 that `pack_conv2d_float8` packed, whatever its layout is by now."""
    return packed.to_dense().permute(0, 2, 3, 1).contiguous().to(FLOAT8)


def prepack_conv2d(
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    input_shape: torch.Size,
) -> Tensor:
    """(K, C / groups, R, S) float32 to the blocked form that suits inputs of `input_shape`."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(input_shape))


def linear(x_q: Tensor, packed: Tensor) -> Tensor:
    """x_q (M, K) int8 by a packed weight; (M, N) float32, the exact sum rounded once."""
    parts, _, depth = packed.shape
    if parts == 1:
        return torch.nn.functional.linear(x_q.float(), packed[0])
    by_part = zip(x_q.split(depth, 1), packed, strict=True)
    sums = [torch.nn.functional.linear(channels.float(), weight) for channels, weight in by_part]
    if parts < 3:  # two exact sums are rounded once
        return sums[0].add_(sums[1])
    total = sums[0].double()
    for part in sums[1:]:
        total.add_(part)
    return total.float()


def conv2d(
    x_q: Tensor,
    packed: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    parts: int,
) -> Tensor:
    """x_q (N, C, H, W) int8, channels_last, by a packed weight; float32, channels_last, the exact sum rounded once.

    `groups` counts parts.
    """
    sums = torch.ops.mkldnn._convolution_pointwise(
        x_q.float(), packed, None, padding, stride, dilation, groups, "none", [], ""
    )
    if parts == 1:
        return sums.contiguous(memory_format=torch.channels_last)
    by_part = sums.unflatten(1, (parts, -1))
    total = by_part[:, 0] + by_part[:, 1] if parts == 2 else by_part.sum(1, dtype=torch.float64).float()
    return total.contiguous(memory_format=torch.channels_last)
