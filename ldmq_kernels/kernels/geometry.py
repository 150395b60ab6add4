"""Sizes that every backend's convolution shares."""

from __future__ import annotations

from collections.abc import Sequence


def conv2d_output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    height, width = (
        (length + 2 * pad - step * (kernel - 1) - 1) // move + 1
        for length, kernel, move, pad, step in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )
    return height, width
