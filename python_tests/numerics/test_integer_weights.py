"""Weights are rounded to the grid that the formats promise: to nearest, or with the layer's inputs in view."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmq_kernels.numerics.formats.int4 import GROUP_SIZE, expand_groups
from ldmq_kernels.numerics.formats.int4_grouped import quantize_weight_w4a16
from ldmq_kernels.numerics.formats.int4_two_level import (
    CHANNEL_SHRINKS,
    divide_multiplier,
    fold_multiplier,
    quantize_weight_w4a8,
)
from ldmq_kernels.numerics.formats.int8 import quantize_weight_int8
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.numerics.test_gptq import correlated, output_error

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
    assert sqnr_db(weight, _w4a8(weight)) > 19.5


def test_w4a8_takes_the_multipliers_and_the_channel_scale_of_least_error():
    weight = _weight((6, 2, 70))
    grouped = quantize_weight_w4a8(weight)
    for channel, scale in zip(weight, grouped.scale, strict=True):
        found = _least_errors(channel, scale).sum()
        largest = channel.abs().max() / (7 * 18)
        every = [_least_errors(channel, largest * shrink).sum() for shrink in CHANNEL_SHRINKS]
        assert torch.isclose(found, min(every), rtol=1e-5)
    errors = _grouped_cubes(weight - _w4a8(weight))
    expected = torch.stack([_least_errors(c, s) for c, s in zip(weight, grouped.scale, strict=True)])
    assert torch.allclose(errors, expected, rtol=1e-4)


def _grouped_cubes(error: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.abs().pow(3).sum(-1) for part in error.split(GROUP_SIZE, -1)], -1)


def _least_errors(channel: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Of each group, over all multipliers."""
    steps = [scale * multiplier for multiplier in range(1, 19)]
    errors = [_grouped_cubes(torch.round(channel / step).clamp(-7, 7) * step - channel) for step in steps]
    return torch.stack(errors).amin(0)


@pytest.mark.parametrize("shape", [(64, 640), (17, 20), (9, 65), (5, 130)])
def test_w4a16_beats_the_scale_of_the_largest_value_and_w4a8(shape):
    weight = _weight(shape)
    largest = torch.stack([part.abs().amax(-1) for part in weight.split(GROUP_SIZE, -1)], -1) / 7
    steps = expand_groups(largest, shape[-1])
    plain = torch.round(weight / steps).clamp(-7, 7) * steps
    found = _w4a16(weight)
    assert (_grouped_cubes(found - weight) <= _grouped_cubes(plain - weight) * 1.0001).all()
    assert sqnr_db(weight, found) > sqnr_db(weight, plain) + 0.2
    assert sqnr_db(weight, found) > sqnr_db(weight, _w4a8(weight)) - 0.05


def test_w4a16_scales_are_positive_and_near_the_largest_value():
    weight = _weight((20, 150))
    weight[3, :64] = 0
    integers, scale = quantize_weight_w4a16(weight)
    largest = torch.stack([part.abs().amax(-1) for part in weight.split(GROUP_SIZE, -1)], -1) / 7
    assert (scale > 0).all()
    assert (scale <= largest.clamp_min(1e-30)).all()
    assert (scale >= 0.59 * largest).all()
    assert not integers[3, :64].any()


# -- with the inputs known --------------------------------------------------------------------------------

GPTQ_SHAPES = [(16, 20), (16, 63), (16, 64), (16, 65), (16, 320), (6, 3, 3, 20), (6, 1, 1, 65), (4, 2, 3, 70)]


def _int8(weight: torch.Tensor, hessian: torch.Tensor | None = None) -> torch.Tensor:
    integers, scale = quantize_weight_int8(weight, hessian)
    return integers * scale.view(-1, *[1] * (weight.dim() - 1))


def _w4a8(weight: torch.Tensor, hessian: torch.Tensor | None = None) -> torch.Tensor:
    grouped = quantize_weight_w4a8(weight, hessian)
    folded = fold_multiplier(grouped.integers, grouped.multiplier)
    return folded * grouped.scale.view(-1, *[1] * (weight.dim() - 1))


def _w4a16(weight: torch.Tensor, hessian: torch.Tensor | None = None) -> torch.Tensor:
    integers, scale = quantize_weight_w4a16(weight, hessian)
    return integers * expand_groups(scale, weight.shape[-1])


@pytest.mark.parametrize(
    ("quantized", "shape"),
    [(q, s) for q in (_int8, _w4a8, _w4a16) for s in GPTQ_SHAPES if len(s) == 2 or q is not _w4a16],
)
def test_a_hessian_lowers_the_error_of_the_output(quantized, shape):
    weight = _weight(shape)
    hessian = correlated(weight[0].numel())
    found, nearest = quantized(weight, hessian), quantized(weight)
    assert output_error(weight - found, hessian) < 0.8 * output_error(weight - nearest, hessian)


@pytest.mark.parametrize("quantized", [_int8, _w4a8, _w4a16])
def test_inputs_that_share_nothing_and_are_alike_round_as_without_a_hessian(quantized):
    weight = _weight((12, 130))
    assert torch.equal(quantized(weight, 5 * torch.eye(130)), quantized(weight))


@pytest.mark.parametrize("shape", GPTQ_SHAPES)
def test_gptq_integers_stay_in_range(shape):
    weight = _weight(shape)
    hessian = correlated(weight[0].numel())
    assert quantize_weight_int8(weight, hessian)[0].abs().max() <= 127
    grouped = quantize_weight_w4a8(weight, hessian)
    assert grouped.integers.dtype == torch.int8
    assert grouped.integers.shape == weight.shape
    assert grouped.integers.abs().max() <= 7
    assert grouped.multiplier.shape == (*shape[:-1], -(-shape[-1] // GROUP_SIZE))
    assert grouped.multiplier.dtype == torch.uint8
    assert 1 <= grouped.multiplier.min() <= grouped.multiplier.max() <= 18


@pytest.mark.parametrize("quantized", [_w4a8, _w4a16])
def test_group_scales_suit_the_inputs_that_count(quantized):
    """One input carries nearly all power: its weights are met better than the larger ones beside them."""
    weight = _weight((32, 64))
    weight[:, 5] *= 0.3
    powers = torch.ones(64)
    powers[5] = 1e5
    found, nearest = (quantized(weight, h)[:, 5] for h in (torch.diag(powers), None))
    assert (found - weight[:, 5]).square().mean() < 0.5 * (nearest - weight[:, 5]).square().mean()


@pytest.mark.parametrize("quantized", [_int8, _w4a8])
def test_a_convolution_takes_its_inputs_in_the_order_of_its_axes(quantized):
    """Six places see one value, all others nothing: only the sum of their weights counts, and of no others."""
    weight = _weight((64, 2, 3, 5))
    seen = torch.zeros(2, 3, 5)
    for place in ((0, 1, 2), (1, 2, 4), (0, 0, 0), (1, 0, 1), (0, 2, 3), (1, 1, 1)):
        seen[place] = 10
    hessian = seen.flatten()[:, None] * seen.flatten()
    known, unknown = (((quantized(weight, h) - weight) * seen).sum((1, 2, 3)).square().mean() for h in (hessian, None))
    assert known < 0.4 * unknown


@pytest.mark.parametrize("quantize", [quantize_weight_int8, quantize_weight_w4a8, quantize_weight_w4a16])
def test_a_hessian_that_is_not_finite_or_of_another_layer_is_refused(quantize):
    weight, bad = _weight((8, 16)), torch.eye(16)
    bad[2, 3] = float("nan")
    with pytest.raises(ValueError, match="hessian holds NaN or infinite"):
        quantize(weight, bad)
    with pytest.raises(ValueError, match=r"hessian is \(15, 15\), but the weight has 16 inputs"):
        quantize(weight, torch.eye(15))


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


def test_a_weight_of_many_blocks_is_rounded_as_its_rows_are():
    weight = torch.randn(700, 3, 384)
    integers, scale = quantize_weight_int8(weight)
    of_last, scale_of_last = quantize_weight_int8(weight[500:])
    assert torch.equal(integers[500:], of_last)
    assert torch.equal(scale[500:], scale_of_last)
    assert (integers * scale[:, None, None] - weight).abs().amax() <= scale.amax() / 2 * (1 + 1e-5)
