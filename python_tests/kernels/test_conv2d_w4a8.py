"""conv2d_w4a8: int4 decoded exactly, times the multiplier of its group under its tap, exact integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from ldmq_kernels.numerics.formats.int4 import pack_int4
from python_tests.kernels.convolutions import ANY, CASES, sizes, weight_shape
from python_tests.kernels.operands import (
    DTYPES,
    FEW_EXAMPLES,
    Backend,
    assert_rounded_once,
    exact_conv2d,
    exact_epilogue,
    folded,
    random_int4,
    random_int8,
    random_multiplier,
    random_scale,
    scrambled,
)

ONE = torch.ones(1)


@pytest.mark.parametrize("case", CASES)
def test_accumulator_is_exact(backend: Backend, case: str) -> None:
    shape, channels, geometry = CASES[case]
    x, full = random_int8(*shape), weight_shape(shape, channels, geometry)
    weight, multiplier = random_int4(*full), random_multiplier(*full)
    exact = exact_conv2d(x, folded(weight, multiplier), geometry)
    assert exact.abs().max() < 2**24
    rest = pack_int4(weight), multiplier, torch.ones(channels), None, None, None, *geometry, torch.float32
    for operand in (x, scrambled(x)):
        assert torch.equal(backend.call("conv2d_w4a8", operand, ONE, *rest).long(), exact)


def test_an_impulse_draws_every_nibble_and_multiplier(backend: Backend) -> None:
    """All 15 values x 18 multipliers as output channels; the impulse's channel lies in a short group."""
    values = torch.arange(-7, 8, dtype=torch.int8).repeat(18)
    weight = values[:, None, None, None].repeat(1, 1, 3, 69)
    weight[..., ::2] = -weight[..., ::2]
    multiplier = torch.arange(1, 19, dtype=torch.uint8).repeat_interleave(15)[:, None, None, None].repeat(1, 1, 3, 2)
    multiplier[:, :, 1, 1] = 19 - multiplier[:, :, 1, 1]
    geometry = ((1, 3), (1, 1), (0, 0, 1, 1), (1, 1), 1, 1)
    for channel in (0, 63, 67, 68):
        x = torch.zeros(1, 69, 1, 3, dtype=torch.int8)
        x[0, channel, 0, 1] = 1
        arguments = x, ONE, pack_int4(weight), multiplier, torch.ones(270), None, None, None, *geometry, torch.float32
        out = backend.call("conv2d_w4a8", *arguments)
        assert torch.equal(out[0, :, 0].flip(1).long(), folded(weight, multiplier)[:, 0, :, channel])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_epilogue_rounds_once(backend: Backend, dtype: torch.dtype, per_sample: bool) -> None:
    shape, channels, geometry = CASES["grouped"]
    x, full = random_int8(*shape), weight_shape(shape, channels, geometry)
    weight, multiplier = random_int4(*full), random_multiplier(*full)
    accumulator = exact_conv2d(x, folded(weight, multiplier), geometry)
    x_scale, weight_scale = random_scale(shape[0] if per_sample else 1), random_scale(channels)
    bias, vector = torch.randn(channels).to(dtype), torch.randn(shape[0], channels).to(dtype)
    residual = torch.randn(accumulator.shape).to(dtype)
    rest = pack_int4(weight), multiplier, weight_scale, bias, vector, residual, *geometry, dtype
    out = backend.call("conv2d_w4a8", x, x_scale, *rest)
    factors = x_scale[:, None, None, None], weight_scale[:, None, None]
    terms = bias[:, None, None], vector[:, :, None, None], residual
    assert_rounded_once(out, *exact_epilogue(accumulator, *factors, terms=terms))


@FEW_EXAMPLES
@given(drawn=ANY)
def test_any_convolution(backend: Backend, drawn: dict) -> None:
    shape, channels, geometry = sizes(drawn)
    x, full = random_int8(*shape), weight_shape(shape, channels, geometry)
    weight, multiplier = random_int4(*full), random_multiplier(*full)
    rest = pack_int4(weight), multiplier, torch.ones(channels), None, None, None, *geometry, torch.float32
    out = backend.call("conv2d_w4a8", x, ONE, *rest)
    assert torch.equal(out.long(), exact_conv2d(x, folded(weight, multiplier), geometry))
