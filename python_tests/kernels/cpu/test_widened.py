"""Integers that are multiplied in float32 give exact sums, however many channels there are."""

from __future__ import annotations

import pytest
import torch

from ldmq_kernels.kernels.backend import Unsupported
from ldmq_kernels.kernels.cpu import backend as cpu
from ldmq_kernels.kernels.cpu import widened
from python_tests.kernels.convolutions import as_op

pytestmark = pytest.mark.skipif(not widened.is_built_in(), reason="this torch has no oneDNN")

EXACT_CHANNELS = 1040  # 127 * 127 * 1040 is the last multiple below 2**24


def _filled(shape: tuple[int, ...], value: int) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.int8)


@pytest.mark.parametrize(
    ("channels", "parts"), [(1, 1), (EXACT_CHANNELS, 1), (1041, 3), (2080, 2), (2082, 3), (1049, 1049), (11520, 12)]
)
def test_a_weight_has_the_fewest_parts_that_are_exact(channels: int, parts: int) -> None:
    assert widened.parts_of(_filled((3, channels), 127)) == parts
    assert widened.parts_of(_filled((3, channels), 1)) == 1


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1280, 320), (17, 4, 20), (5, 11520, 3), (3, 2082, 4), (2, 1049, 2)])
def test_linear_sums_of_the_largest_products_are_exact(rows: int, k: int, n: int, sign: int) -> None:
    x_q, weight = _filled((rows, k), 127 * sign), _filled((n, k), 127)
    weight[0, ::2] = -126  # an odd sum
    x_q[0, 0] = 1
    packed = widened.pack_linear(weight)
    out = cpu.linear_w8a8(x_q, torch.ones(1), packed, torch.ones(n), None, None, torch.float32)
    assert torch.equal(out, (x_q.long() @ weight.long().t()).to(torch.float32))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("channels", "out_channels", "groups"), [(4, 20, 1), (960, 4, 1), (234, 3, 1), (64, 32, 4), (64, 64, 64)]
)
def test_convolution_sums_of_the_largest_products_are_exact_at_the_padding_too(
    channels: int, out_channels: int, groups: int, sign: int
) -> None:
    x_q = _filled((2, channels, 7, 5), 127 * sign)
    weight = _filled((out_channels, 3, 3, channels // groups), 127)
    x_q[0, 0, 3, 2], weight[0, 1, 1] = 1, -126
    geometry = ((1, 1), (1, 1), (1, 1), groups)
    packed, ones = widened.pack_conv2d(weight), torch.ones(out_channels)
    out = cpu.conv2d_w8a8(x_q, torch.ones(1), packed, ones, None, None, None, (3, 3), *as_op(*geometry), torch.float32)
    exact = torch.nn.functional.conv2d(x_q.double(), weight.permute(0, 3, 1, 2).double(), None, *geometry)
    assert torch.equal(out, exact.float())


def test_a_grouped_convolution_of_more_channels_than_are_exact_is_refused() -> None:
    x_q, weight = _filled((1, 480, 3, 3), 127), _filled((2, 3, 3, 240), 127)
    arguments = (torch.ones(2), None, None, None, (3, 3), *as_op((1, 1), (1, 1), (1, 1), 2), torch.float32)
    with pytest.raises(Unsupported, match="too large to be exact"):
        cpu.conv2d_w8a8(x_q, torch.ones(1), widened.pack_conv2d(weight), *arguments)
