"""conv2d_w8a16: int8 weights enter the product exactly; float32 sums; one rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from python_tests.kernels.convolutions import ANY, CASES, sizes, weight_shape
from python_tests.kernels.operands import (
    DTYPES,
    FEW_EXAMPLES,
    Backend,
    assert_weight_only,
    exact_conv2d,
    random_int8,
    random_scale,
    scrambled,
)


def check(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], channels: int, geometry: tuple, with_bias: bool
) -> None:
    x, weight = torch.randn(shape).to(dtype), random_int8(*weight_shape(shape, channels, geometry))
    scale = random_scale(channels)
    bias = torch.randn(channels).to(dtype) if with_bias else None
    shift = torch.zeros(channels, 1, 1).double() if bias is None else bias.double()[:, None, None]
    exact = exact_conv2d(x, weight, geometry) * scale[:, None, None] + shift
    magnitude = exact_conv2d(x.abs(), weight.abs(), geometry) * scale[:, None, None] + shift.abs()
    restored = (weight * scale[:, None, None, None]).to(dtype).permute(0, 3, 1, 2)
    _, stride, (top, bottom, left, right), dilation, groups, upsample = geometry
    padded = torch.nn.functional.pad(
        torch.kron(x, torch.ones(upsample, upsample)).to(dtype), (left, right, top, bottom)
    )
    in_torch = torch.nn.functional.conv2d(padded, restored, bias, stride, 0, dilation, groups)
    for operand in (x, scrambled(x)):
        out = backend.call("conv2d_w8a16", operand, weight, scale, bias, *geometry)
        assert_weight_only(backend, out, exact, magnitude, in_torch)


@pytest.mark.parametrize("case", CASES)
def test_rounds_once(backend: Backend, case: str) -> None:
    check(backend, torch.float16, *CASES[case], with_bias=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_rounds_once_in_every_dtype(backend: Backend, dtype: torch.dtype, with_bias: bool) -> None:
    check(backend, dtype, *CASES["grouped"], with_bias=with_bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_impulse_draws_the_kernel(backend: Backend, dtype: torch.dtype) -> None:
    weight = random_int8(9, 3, 3, 20)
    x = torch.zeros(1, 20, 5, 5).to(dtype)
    x[0, 13, 2, 2] = 1
    out = backend.call("conv2d_w8a16", x, weight, torch.ones(9), None, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)
    assert torch.equal(out[0, :, 1:4, 1:4].flip(1, 2), weight[..., 13].to(dtype))
    assert out.count_nonzero() == weight[..., 13].count_nonzero()


@FEW_EXAMPLES
@given(drawn=ANY)
def test_any_convolution(backend: Backend, drawn: dict) -> None:
    check(backend, torch.float32, *sizes(drawn), with_bias=False)
