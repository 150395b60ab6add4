"""Weights are rounded to the nearest point of the grid that the formats promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmq_kernels.numerics.affine import (
    divide_multiplier,
    expand_groups,
    fold_multiplier,
    quantize_weight_int8,
    quantize_weight_w4a8,
    quantize_weight_w4a16,
)
from ldmq_kernels.numerics.sqnr import sqnr_db

SHAPES = [(320, 960), (17, 20), (5, 4), (8, 3, 3, 130)]


def _weight(shape: tuple[int, ...]) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    rows = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=random) + 0.05
    return torch.randn(shape, generator=random) * rows


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_errors_stay_within_half_a_step(shape):
    weight = _weight(shape)
    integers, scale = quantize_weight_int8(weight)
    step = scale.view(-1, *[1] * (weight.dim() - 1))
    assert integers.abs().max() == 127
    assert ((integers * step - weight).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_w4a8_folds_to_int8_and_back_exactly(shape):
    grouped = quantize_weight_w4a8(_weight(shape))
    assert grouped.integers.abs().max() <= 7
    assert grouped.multiplier.min() >= 1
    assert grouped.multiplier.max() <= 18
    folded = fold_multiplier(grouped.integers, grouped.multiplier)
    wide = grouped.integers.int() * expand_groups(grouped.multiplier, shape[-1]).int()
    assert torch.equal(folded.int(), wide)
    assert torch.equal(divide_multiplier(folded, grouped.multiplier), grouped.integers)


@pytest.mark.parametrize("shape", [(64, 640), (32, 3, 3, 320)])
def test_w4a8_keeps_the_quality_of_int4(shape):
    weight = _weight(shape)
    grouped = quantize_weight_w4a8(weight)
    restored = fold_multiplier(grouped.integers, grouped.multiplier).float()
    restored *= grouped.scale.view(-1, *[1] * (weight.dim() - 1))
    assert sqnr_db(weight, restored) > 18


def test_w4a16_beats_w4a8_with_its_free_group_scales():
    weight = _weight((64, 640))
    integers, scale = quantize_weight_w4a16(weight)
    restored = integers * expand_groups(scale, 640)
    assert ((restored - weight).abs() <= expand_groups(scale, 640) * 0.5001).all()


@pytest.mark.parametrize("quantize", [quantize_weight_int8, quantize_weight_w4a8, quantize_weight_w4a16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(quantize, bad):
    weight = _weight((8, 16))
    weight[3, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight)


def test_an_all_zero_channel_is_exactly_zero_and_has_a_positive_scale():
    weight = _weight((8, 16))
    weight[3] = 0
    integers, scale = quantize_weight_int8(weight)
    assert (integers[3] == 0).all()
    assert (scale > 0).all()
    grouped = quantize_weight_w4a8(weight)
    assert (grouped.integers[3] == 0).all()
    assert torch.isfinite(grouped.scale).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.integers(0, 2**31))
def test_int8_is_the_same_for_a_weight_times_a_power_of_two(rows, channels, seed):
    weight = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))
    integers, scale = quantize_weight_int8(weight)
    again, twice = quantize_weight_int8(weight * 4)
    assert torch.equal(integers, again)
    assert torch.equal(twice, scale * 4)
