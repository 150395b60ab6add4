"""Facts about all elements of a tensor."""

import math

import pytest
import torch

from ldmq_kernels.numerics.sums import BLOCK, absmax, is_finite, power_of, row_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(dtype, number):
    x = torch.randn(3, 5, 7).to(dtype)
    assert is_finite(x)
    assert is_finite(x.transpose(0, 2))
    for place in (0, 52, 104):
        spoiled = x.clone()
        spoiled.view(-1)[place] = number
        assert not is_finite(spoiled)


def test_nothing_is_finite():
    assert is_finite(torch.empty(0, 4))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 300, 400)])
def test_the_power_is_that_of_float64(shape):
    x = torch.randn(shape) * 1e3
    assert power_of(x) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("axes", [(), (0,), (1, 2), (0, 2)])
def test_the_largest_absolute_value_is_found_over_axes(axes):
    x = torch.randn(3, 5, 7)
    x[0, 0, 0], x[2, 4, 6] = -9, math.nan
    assert torch.equal(absmax(x, axes).nan_to_num(-1), (x.abs().amax(axes) if axes else x.abs()).nan_to_num(-1))


@pytest.mark.parametrize("shape", [(3, 5), (1, BLOCK + 1), (1000, 3, 501), (7, BLOCK)])
def test_blocks_are_all_rows_in_order(shape):
    x = torch.randn(shape)
    blocks = row_blocks(x)
    assert torch.equal(torch.cat(list(blocks)), x)
    assert all(len(block) == 1 or block.numel() <= BLOCK for block in blocks)
    blocks[-1].zero_()
    assert not x[-1].any()
