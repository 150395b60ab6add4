"""Sizes that every backend's convolution shares, and the plain way to enlarge and pad an input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def check_channels(channels: int, factors: Tensor | None) -> None:
    """Refuse factors of another number of channels, which torch would spread over an input that is one wide.

    Args:
        channels: of the input.
        factors: (1,) or (C,), or None.

    Raises:
        ValueError: C is another number.
    """
    if factors is not None and factors.numel() not in (1, channels):
        raise ValueError(f"the input has {channels} channels, its scales are for {factors.numel()}")


def conv2d_output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    upsample: int,
) -> tuple[int, int]:
    """Height and width of a convolution's output; `padding` is (top, bottom, left, right)."""
    pads = padding[0] + padding[1], padding[2] + padding[3]
    height, width = (
        (upsample * length + pad - step * (kernel - 1) - 1) // move + 1
        for length, kernel, move, pad, step in zip(size, kernel_size, stride, pads, dilation, strict=True)
    )
    return height, width


def enlarged_and_padded(x: Tensor, padding: Sequence[int], upsample: int) -> tuple[Tensor, tuple[int, int]]:
    """x (N, C, H, W) for a convolution that pads both sides alike, and that padding (height, width).

    Nearest-neighbour enlargement, and any padding that is not the same on both sides, are done here.
    """
    if upsample > 1:
        samples, channels, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]
        repeated = pixels.expand(samples, height, upsample, width, upsample, channels)
        x = repeated.reshape(samples, height * upsample, width * upsample, channels).permute(0, 3, 1, 2)
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return x, (top, left)
    return functional.pad(x, (left, right, top, bottom)), (0, 0)
