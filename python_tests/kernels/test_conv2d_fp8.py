"""conv2d_fp8: every tap reads its e4m3 values, padding is zero, sums are float32's, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from ldmq_kernels.kernels.cpu.widened import pack_conv2d_float8, unpack_conv2d_float8
from python_tests.kernels.convolutions import ANY, CASES, sizes, weight_shape
from python_tests.kernels.operands import (
    FEW_EXAMPLES,
    Backend,
    assert_float8_sum,
    exact_conv2d,
    exact_epilogue,
    random_float8,
    random_scale,
    scrambled,
)

ONE, FLOAT8 = torch.ones(1), torch.float8_e4m3fn
PADDED = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)


# what is not shared with int8 is the dtype of each way to read: by TMA, by gathered pointers, enlarged, in groups
READ = ("3x3", "asymmetric", "grouped", "mostly padding", "upsampled", "tma tiles", "tma tiles downsample", "whole")


@pytest.mark.parametrize("case", [*READ, "tma tiles upsampled, odd output"])
def test_sums_are_those_of_float32(backend: Backend, case: str) -> None:
    shape, out_channels, geometry = CASES[case]
    x, weight = random_float8(*shape), random_float8(*weight_shape(shape, out_channels, geometry))
    magnitude = exact_conv2d(x.float().abs(), weight.float().abs(), geometry)
    scale = torch.ones(out_channels)
    for operand in (x.contiguous(memory_format=torch.channels_last), scrambled(x)):
        out = backend.call("conv2d_fp8", operand, ONE, weight, scale, None, None, None, *geometry, torch.float32)
        assert_float8_sum(backend, out, exact_conv2d(x, weight, geometry), magnitude)


def test_an_impulse_draws_the_kernel(backend: Backend) -> None:
    weight = random_float8(16, 3, 3, 32)
    x = torch.zeros(1, 32, 5, 5, dtype=FLOAT8)
    x[0, 13, 2, 2] = 1
    out = backend.call("conv2d_fp8", x, ONE, weight, torch.ones(16), None, None, None, *PADDED, torch.float32)
    assert torch.equal(out[0, :, 1:4, 1:4].flip(1, 2), weight[..., 13].float())
    assert out.count_nonzero() == weight[..., 13].float().count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_epilogue_rounds_once(backend: Backend, dtype: torch.dtype) -> None:
    shape, channels, geometry = CASES["3x3"]
    x, weight = random_float8(*shape), random_float8(*weight_shape(shape, channels, geometry))
    accumulator = exact_conv2d(x, weight, geometry)
    x_scale, weight_scale = random_scale(shape[0]), random_scale(channels)
    bias, vector = torch.randn(channels).to(dtype), torch.randn(shape[0], channels).to(dtype)
    residual = torch.randn(accumulator.shape).to(dtype)
    terms = bias[:, None, None], vector[:, :, None, None], residual
    factors = x_scale[:, None, None, None], weight_scale[:, None, None]
    arguments = x, x_scale, weight, weight_scale, bias, vector, residual, *geometry, dtype
    exact, _ = exact_epilogue(accumulator, *factors, terms=terms)
    products = exact_conv2d(x.float().abs(), weight.float().abs(), geometry)
    _, magnitude = exact_epilogue(products, *factors, terms=terms)
    assert_float8_sum(backend, backend.call("conv2d_fp8", *arguments), exact, magnitude)


def test_a_widened_weight_gives_the_same_on_every_backend(backend: Backend) -> None:
    if backend.device.type != "cpu":
        pytest.skip("the CPU backend's layout is met on a CPU alone")
    x, weight = random_float8(2, 32, 5, 4), random_float8(16, 3, 3, 32)
    packed = pack_conv2d_float8(weight)
    assert torch.equal(unpack_conv2d_float8(packed).view(torch.uint8), weight.view(torch.uint8))
    outs = [
        backend.call("conv2d_fp8", x, ONE, w, torch.ones(16), None, None, None, *PADDED, torch.float32)
        for w in (weight, packed)
    ]
    assert torch.equal(*outs)


@settings(FEW_EXAMPLES, max_examples=4)  # of shapes, int8 tries more
@given(drawn=ANY)
def test_any_convolution(backend: Backend, drawn: dict) -> None:
    shape, channels, geometry = sizes(drawn)
    x, weight = random_float8(*shape), random_float8(*weight_shape(shape, channels, geometry))
    scale = torch.ones(channels)
    out = backend.call("conv2d_fp8", x, ONE, weight, scale, None, None, None, *geometry, torch.float32)
    magnitude = exact_conv2d(x.float().abs(), weight.float().abs(), geometry)
    assert_float8_sum(backend, out, exact_conv2d(x, weight, geometry), magnitude)
