"""The largest integers, where a product that saturates or an output that overflows would show."""

from __future__ import annotations

import pytest
import torch

from ldmq_kernels.kernels.cpu import backend as cpu
from ldmq_kernels.kernels.cpu.packing import pack_conv2d, pack_linear
from python_tests.kernels.convolutions import as_op


def _filled(shape: tuple[int, ...], value: int) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.int8)


@pytest.mark.needs_exact_onednn
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1280, 320), (17, 4, 20), (63, 960, 64), (4097, 20, 4)])
def test_linear_sums_of_the_largest_products_are_exact(rows, k, n, sign):
    weight = pack_linear(_filled((n, k), 127))
    out = cpu.linear_w8a8(
        _filled((rows, k), 127 * sign), torch.ones(1), weight, torch.ones(n), None, None, torch.float32
    )
    assert torch.equal(out, torch.full((rows, n), float(127 * 127 * k * sign)))


@pytest.mark.needs_exact_onednn
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("channels", "out_channels", "groups"), [(4, 320, 1), (960, 4, 1), (64, 64, 64), (64, 32, 4)])
def test_convolution_sums_of_the_largest_products_are_exact_at_the_padding_too(channels, out_channels, groups, sign):
    geometry = ((1, 1), (1, 1), (1, 1), groups)
    x_q, weight = _filled((2, channels, 8, 8), 127 * sign), _filled((out_channels, 3, 3, channels // groups), 127)
    packed, ones = pack_conv2d(weight), torch.ones(out_channels)
    out = cpu.conv2d_w8a8(x_q, torch.ones(1), packed, ones, None, None, None, (3, 3), *as_op(*geometry), torch.float32)
    exact = torch.nn.functional.conv2d(x_q.double(), weight.permute(0, 3, 1, 2).double(), None, *geometry)
    assert torch.equal(out.double(), exact.float().double())


@pytest.mark.needs_exact_onednn
def test_float16_output_is_finite_where_the_accumulator_is_not_a_float16():
    k, scale = 1280, torch.full((8,), 1e-3)
    weight = pack_linear(_filled((8, k), 127))
    out = cpu.linear_w8a8(_filled((3, k), 127), torch.full((1,), 1e-2), weight, scale, None, None, torch.float16)
    assert torch.equal(out, torch.full((3, 8), 127 * 127 * k * 1e-5).half())


def test_values_between_two_integers_round_to_even_across_block_borders(monkeypatch):
    from ldmq_kernels.kernels.cpu import blocks

    monkeypatch.setattr(blocks, "BLOCK_PER_THREAD", 64)
    x = torch.arange(-300, 340, dtype=torch.float32).div_(2).view(-1, 8)
    expected = torch.round(x).clamp(-127, 127).to(torch.int8)
    assert torch.equal(cpu.quantize_static(x, torch.ones(1), -1), expected)
