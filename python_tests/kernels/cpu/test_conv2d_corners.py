"""The corners where oneDNN's int8 convolution is wrong are multiplied in float32, and nothing that models do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldmq_kernels.kernels.cpu import backend as cpu
from ldmq_kernels.kernels.cpu.conv2d_w8a8 import is_wrong_in_onednn
from ldmq_kernels.kernels.cpu.packing import pack_conv2d

Geometry = tuple[Any, ...]  # size, kernel, stride, padding, dilation


@pytest.mark.parametrize(
    "geometry",
    [
        ((6, 6), (5, 5), (1, 1), (5, 5), (1, 1)),  # outputs that see only padding
        ((6, 6), (1, 3), (1, 1), (1, 1), (1, 1)),
        ((8, 1), (2, 2), (1, 1), (1, 1), (2, 2)),
        ((8, 4), (4, 4), (4, 4), (0, 0), (1, 1)),  # an output that is one pixel wide
        ((9, 3), (3, 3), (1, 2), (0, 0), (1, 1)),
    ],
)
def test_a_corner_is_computed_elsewhere(geometry: Geometry) -> None:
    assert is_wrong_in_onednn(*geometry)
    size, kernel, stride, (above, left), dilation = geometry
    generator = torch.Generator().manual_seed(0)
    x_q = torch.randint(-127, 128, (2, 3, *size), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (5, *kernel, 3), dtype=torch.int8, generator=generator)
    rest = (torch.ones(5), None, None, None, kernel, stride, (above, above, left, left), dilation, 1, 1, torch.float32)
    out = cpu.conv2d_w8a8(x_q, torch.ones(1), pack_conv2d(weight), *rest)
    exact = torch.nn.functional.conv2d(
        x_q.double(), weight.permute(0, 3, 1, 2).double(), None, stride, (above, left), dilation
    )
    assert torch.equal(out.double(), exact)


@pytest.mark.parametrize(
    "geometry",
    [
        ((64, 64), (3, 3), (1, 1), (1, 1), (1, 1)),
        ((64, 64), (3, 3), (2, 2), (1, 1), (1, 1)),
        ((1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
        ((64, 64), (1, 1), (1, 1), (0, 0), (1, 1)),
        ((32, 32), (7, 7), (1, 1), (3, 3), (1, 1)),
        ((16, 16), (3, 3), (1, 1), (2, 2), (2, 2)),
    ],
)
def test_what_models_do_is_taken(geometry: Geometry) -> None:
    assert not is_wrong_in_onednn(*geometry)
