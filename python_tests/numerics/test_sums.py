"""Facts about all elements of a tensor."""

import math

import pytest
import torch

from ldmq_kernels.numerics.sums import is_finite, power_of


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
