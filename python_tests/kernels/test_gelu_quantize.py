"""gelu_quantize is GELU and quantization in float32, but for one step near a tie, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from python_tests.kernels.operands import FEW_EXAMPLES, Backend, scrambled
from python_tests.kernels.producers import EPS, MODES, assert_quantized, factors, rounding


def exact_gelu(x: Tensor, tanh: bool) -> Tensor:
    wide = x.double()
    if tanh:
        return wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))) / 2
    return wide * (1 + torch.erf(wide / math.sqrt(2))) / 2


def check(backend: Backend, x: Tensor, tanh: bool, mode: str) -> None:
    y = exact_gelu(x, tanh)
    # exp takes the rounding of its argument as a relative error, and the erfc of the kernels is within 1.5e-7
    error = EPS * ((4 + x.double().abs() ** 3) * y.abs() + 2 * x.double().abs()) + rounding(backend, x.dtype, y)
    given_factors = factors(mode, y)
    assert_quantized(backend, *backend.call("gelu_quantize", x, tanh, *given_factors), y, error, *given_factors)


@pytest.mark.parametrize(
    ("shape", "dtype", "tanh"),
    [
        ((17, 320), torch.float16, True),
        ((3, 5, 20), torch.float32, True),
        ((17, 320), torch.float32, False),
        ((2, 2560), torch.bfloat16, True),
        ((3, 5, 20), torch.bfloat16, False),
        ((5, 1), torch.float16, False),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_is_the_definition(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], mode: str, tanh: bool) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    check(backend, x, tanh, mode)
    check(backend, scrambled(x), tanh, mode)


@pytest.mark.parametrize("tanh", [True, False])
def test_rows_of_zeros_and_of_very_negative_values_are_zero(backend: Backend, tanh: bool) -> None:
    x = torch.randn(3, 20)
    x[0], x[1] = 0, -200
    q, scale = backend.call("gelu_quantize", x, tanh, None, None)
    assert not q[:2].any()
    assert (scale[:2] < 1e-12).all()
    assert (scale > 0).all()


def test_large_values_pass(backend: Backend) -> None:
    x = torch.tensor([[2.5, 1e4, -1e15, 3.0]])
    q, scale = backend.call("gelu_quantize", x, True, None, None)
    assert scale.item() * 127 == pytest.approx(1e4, rel=1e-6)
    assert q.tolist() == [[0, 127, 0, 0]]


def test_the_two_formulas_are_told_apart(backend: Backend) -> None:
    """They differ by up to 5e-4, around 2.2."""
    x, inv_scale = torch.full((1, 8), -2.2), torch.full((1,), 3e3)
    found = [backend.call("gelu_quantize", x, tanh, inv_scale, None)[0][0, 0].item() for tanh in (True, False)]
    wanted = [round(3e3 * exact_gelu(x, tanh)[0, 0].item()) for tanh in (True, False)]
    assert found == wanted
    assert found[0] != found[1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_its_own_scale_only(backend: Backend, value: float) -> None:
    x = torch.randn(4, 20)
    x[2, 7] = value
    _, scale = backend.call("gelu_quantize", x, True, None, None)
    assert scale.isfinite().tolist() == [True, True, False, True]


@FEW_EXAMPLES
@given(
    batch=st.lists(st.integers(0, 5), max_size=3),
    channels=st.integers(1, 200),
    tanh=st.booleans(),
    mode=st.sampled_from(MODES),
)
def test_any_shape(backend: Backend, batch: list[int], channels: int, tanh: bool, mode: str) -> None:
    x = torch.randn(*batch, channels)
    if x.numel():
        check(backend, x, tanh, mode)
    else:
        inv_scale = torch.ones(1) if "inv_scale" in mode else None
        q, _ = backend.call("gelu_quantize", x, tanh, inv_scale, None)
        assert q.shape == x.shape
