"""conv2d_w8a8: exact integers, exact padding, one rounding, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from ldmq_kernels.kernels.cpu.packing import pack_conv2d
from python_tests.kernels.convolutions import ANY, CASES, sizes, weight_shape
from python_tests.kernels.operands import (
    DTYPES,
    FEW_EXAMPLES,
    Backend,
    assert_rounded_once,
    exact_conv2d,
    exact_epilogue,
    random_int8,
    random_scale,
    scrambled,
)

ONE = torch.ones(1)
PADDED = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)


@pytest.mark.parametrize("case", CASES)
def test_accumulator_is_exact(backend: Backend, case: str) -> None:
    shape, out_channels, geometry = CASES[case]
    x, weight = random_int8(*shape), random_int8(*weight_shape(shape, out_channels, geometry))
    exact = exact_conv2d(x, weight, geometry)
    assert exact.abs().max() < 2**24
    scale = torch.ones(out_channels)
    for operand in (x, x.contiguous(memory_format=torch.channels_last), scrambled(x)):
        out = backend.call("conv2d_w8a8", operand, ONE, weight, scale, None, None, None, *geometry, torch.float32)
        assert torch.equal(out.long(), exact)


def test_no_sum_of_extremes_saturates_and_padding_is_zero(backend: Backend) -> None:
    x, weight = torch.full((1, 64, 4, 5), -127, dtype=torch.int8), torch.full((16, 3, 3, 64), 127, dtype=torch.int8)
    out = backend.call("conv2d_w8a8", x, ONE, weight, torch.ones(16), None, None, None, *PADDED, torch.float32)
    assert torch.equal(out.long(), exact_conv2d(x, weight, PADDED))
    assert out[0, 0, 0, 0] == -4 * 64 * 127 * 127
    assert out[0, 0, 1, 1] == -9 * 64 * 127 * 127


def test_an_impulse_draws_the_kernel(backend: Backend) -> None:
    weight = random_int8(9, 3, 3, 20)
    x = torch.zeros(1, 20, 5, 5, dtype=torch.int8)
    x[0, 13, 2, 2] = 1
    out = backend.call("conv2d_w8a8", x, ONE, weight, torch.ones(9), None, None, None, *PADDED, torch.float32)
    assert torch.equal(out[0, :, 1:4, 1:4].flip(1, 2), weight[..., 13].float())
    assert out.count_nonzero() == weight[..., 13].count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["3x3", "shortcut", "depthwise"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("with_terms", [False, True])
def test_epilogue_rounds_once(
    backend: Backend, dtype: torch.dtype, case: str, per_sample: bool, with_terms: bool
) -> None:
    shape, channels, geometry = CASES[case]
    x, weight = random_int8(*shape), random_int8(*weight_shape(shape, channels, geometry))
    accumulator = exact_conv2d(x, weight, geometry)
    x_scale, weight_scale = random_scale(shape[0] if per_sample else 1), random_scale(channels)
    bias = vector = residual = None
    terms: tuple = ()
    if with_terms:
        bias, vector = torch.randn(channels).to(dtype), torch.randn(shape[0], channels).to(dtype)
        residual = torch.randn(accumulator.shape).to(dtype)
        terms = bias[:, None, None], vector[:, :, None, None], residual
    arguments = x, x_scale, weight, weight_scale, bias, vector, residual, *geometry, dtype
    factors = x_scale[:, None, None, None], weight_scale[:, None, None]
    assert_rounded_once(backend.call("conv2d_w8a8", *arguments), *exact_epilogue(accumulator, *factors, terms=terms))


def test_a_packed_weight_gives_the_same_on_every_backend(backend: Backend) -> None:
    if backend.device.type != "cpu":
        pytest.skip("the CPU backend's layout is met on a CPU alone")
    shape, channels, geometry = CASES["3x3"]
    x, weight = random_int8(*shape), random_int8(*weight_shape(shape, channels, geometry))
    rest = random_scale(channels), torch.randn(channels), None, None, *geometry, torch.float32
    wanted = backend.call("conv2d_w8a8", x, ONE, weight, *rest)
    assert torch.equal(backend.call("conv2d_w8a8", x, ONE, pack_conv2d(weight), *rest), wanted)


@FEW_EXAMPLES
@given(drawn=ANY)
def test_any_convolution(backend: Backend, drawn: dict) -> None:
    shape, channels, geometry = sizes(drawn)
    x, weight = random_int8(*shape), random_int8(*weight_shape(shape, channels, geometry))
    scale = torch.ones(channels)
    out = backend.call("conv2d_w8a8", x, ONE, weight, scale, None, None, None, *geometry, torch.float32)
    assert torch.equal(out.long(), exact_conv2d(x, weight, geometry))


def test_scales_and_bias_may_have_any_strides(backend: Backend) -> None:
    x, weight, scale = random_int8(2, 20, 5, 5), random_int8(7, 3, 3, 20), random_scale(7, 3)
    for column in (scale[:, 1], scale[:1, 0].expand(7)):
        dense = column.contiguous()
        outs = [
            backend.call("conv2d_w8a8", x, ONE, weight, values, values, None, None, *PADDED, torch.float32)
            for values in (column, dense)
        ]
        assert torch.equal(*outs)
