"""A pair of int8 values holds what 16 bits would."""

import pytest
import torch

from ldmq_kernels.numerics.split import LOW_STEPS, quantize_low_part


def high_of(x: torch.Tensor, inv_scale: torch.Tensor) -> torch.Tensor:
    return torch.round(x.float() * inv_scale).clamp(-127, 127).to(torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pair_is_within_half_a_fine_step(dtype):
    x = (torch.randn(3, 17, 20, generator=torch.Generator().manual_seed(0)) * 0.7).to(dtype)
    inv_scale = torch.rand(20, generator=torch.Generator().manual_seed(1)) * 20 + 10
    high = high_of(x, inv_scale)
    low = quantize_low_part(x, high, inv_scale, -1)
    assert low.dtype == torch.int8
    assert int(low.abs().max()) <= 127
    error = (high.double() + low.double() / LOW_STEPS) / inv_scale.double() - x.double()
    assert float((error * inv_scale).abs().max()) <= 0.5 / LOW_STEPS + 1e-5
    assert float((error * inv_scale).abs().max()) > 0.1 / LOW_STEPS


def test_channels_of_a_picture_take_their_own_reciprocal():
    x = torch.ones(1, 2, 3, 3)
    inv_scale = torch.tensor([10.25, 20.5])
    low = quantize_low_part(x, torch.tensor([10, 20], dtype=torch.int8).view(1, 2, 1, 1).expand_as(x), inv_scale, 1)
    assert low[0, 0].unique().tolist() == [round(0.25 * LOW_STEPS + 1e-9)]
    assert low[0, 1].unique().tolist() == [127]


def test_beyond_the_range_both_values_saturate():
    x = torch.tensor([[1000.0, -1000.0]])
    high = high_of(x, torch.tensor([1.0]))
    assert quantize_low_part(x, high, torch.tensor([1.0]), -1).tolist() == [[127, -127]]
