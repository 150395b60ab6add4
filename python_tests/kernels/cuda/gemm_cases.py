"""What the tests of the GEMMs share: names of all tiles, convolutions, operands on their device."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

NAMES = {
    "linear_w8a8": [
        "sm90 256x160x128x4 cooperative cluster 2",
        "sm90 256x128x128x4 cooperative cluster 2",
        "sm90 128x256x128x4 cooperative cluster 2",
        "sm90 128x160x128x6 cooperative cluster 2",
        "sm90 128x160x128x6 cluster 2",
        "sm90 128x160x128x6",
        "sm90 128x160x64x10 cluster 2",
        "sm90 128x128x128x7",
        "sm90 64x160x128x7",
        "sm90 128x64x128x8 cooperative",
        "sm80 128x160x64x4",
        "sm80 128x128x64x4",
        "sm80 256x128x64x3",
        "sm80 64x128x64x4",
        "sm80 64x64x64x6",
    ],
    "conv2d_w8a8": [
        "sm90 256x160x128x4 cooperative cluster 2",
        "sm90 128x256x128x4 cooperative cluster 2",
        "sm90 128x160x128x6 cluster 2",
        "sm90 128x160x64x10 cluster 2",
        "sm90 128x128x128x7",
        "sm90 64x160x128x7",
        "sm90 128x64x128x8 cooperative",
        "sm80 128x160x64x4",
        "sm80 128x128x64x4",
        "sm80 64x128x64x4",
        "sm80 64x64x64x6",
    ],
    "linear_w4a8": [
        "sm90 160x128x128x7 cooperative cluster 2",
        "sm90 256x128x128x5 cooperative cluster 2",
        "sm90 256x128x128x5 cooperative",
        "sm90 128x128x128x8 cooperative",
        "sm90 64x128x128x8 cooperative",
        "sm80 128x160x64x4",
        "sm80 128x128x64x4",
        "sm80 64x128x64x4",
        "sm80 64x64x64x6",
    ],
    "linear_fp8": [
        "sm90 256x128x128x4 cooperative cluster 2",
        "sm90 128x160x128x6 cooperative cluster 2",
        "sm90 128x160x64x10 cooperative cluster 2",
        "sm90 128x128x128x7 cooperative",
        "sm90 128x64x128x8 cooperative",
        "sm89 128x128x64x4",
        "sm89 64x64x64x6",
    ],
    "linear_geglu_w8a8": [
        "sm90 128x256x128x4 cooperative cluster 2",
        "sm90 128x128x128x7 cluster 2",
        "sm90 128x128x128x7",
        "sm90 128x64x128x8 cooperative",
        "sm80 256x128x64x3",
        "sm80 128x128x64x4",
        "sm80 64x128x64x4",
    ],
    "linear_geglu_fp8": [
        "sm90 256x128x128x4 cooperative cluster 2",
        "sm90 128x128x128x7 cooperative",
        "sm90 128x64x128x8 cooperative",
        "sm89 128x128x64x4",
        "sm89 64x128x64x4",
    ],
    "conv2d_fp8": [
        "sm90 256x128x128x4 cooperative cluster 2",
        "sm90 128x160x128x6 cooperative cluster 2",
        "sm90 128x160x64x10 cooperative cluster 2",
        "sm90 128x64x128x8 cooperative",
        "sm89 128x128x64x4",
        "sm89 64x64x64x6",
    ],
}
ONE = torch.ones(1)
# (input (N, C, H, W), output channels, (kernel, stride, padding, dilation, groups, upsample))
CONVOLUTIONS = {
    "3x3": ((3, 48, 9, 7), 168, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)),
    "wide": ((1, 320, 17, 9), 8, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)),
    "downsample": ((2, 144, 8, 5), 40, ((3, 3), (2, 2), (0, 1, 0, 1), (1, 1), 1, 1)),
    "1x1": ((2, 32, 6, 7), 24, ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 1)),
    "uneven": ((1, 16, 11, 10), 16, ((3, 2), (1, 2), (2, 0, 1, 3), (2, 3), 1, 1)),
    "one pixel": ((2, 16, 1, 1), 8, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)),
}
UPSAMPLED = ((2, 32, 5, 4), 24, ((3, 3), (1, 1), (0, 1, 2, 0), (1, 1), 1, 2))


def tiles_of(op: str, kind: str = "") -> pytest.MarkDecorator:
    """The test for every tile of an op, or for those whose names match `kind`."""
    names = [name for name in NAMES[op] if re.search(kind, name)]
    return pytest.mark.parametrize("tile", [(op, name) for name in names], ids=names, indirect=True)


def on(device: torch.device, *operands: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if operand is None else operand.to(device) for operand in operands)


def image(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
