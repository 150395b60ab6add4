"""silu_quantize is SiLU and quantization in float32, but for one step near a tie, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from python_tests.kernels.operands import DTYPES, FEW_EXAMPLES, Backend, scrambled
from python_tests.kernels.producers import EPS, MODES, assert_quantized, factors, rounding


def check(backend: Backend, x: Tensor, mode: str) -> None:
    y = torch.nn.functional.silu(x.double())
    # exp takes the rounding of its argument as a relative error
    error = EPS * (4 + x.double().abs()) * y.abs() + rounding(backend, x.dtype, y)
    given_factors = factors(mode, y)
    assert_quantized(backend, *backend.call("silu_quantize", x, *given_factors), y, error, *given_factors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17, 320), (3, 5, 20), (2, 2560), (63, 4), (5, 1), (960,)])
@pytest.mark.parametrize("mode", MODES)
def test_is_the_definition(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], mode: str) -> None:
    x = (torch.randn(shape) * 4).to(dtype)
    check(backend, x, mode)
    check(backend, scrambled(x), mode)


def test_rows_of_zeros_and_of_very_negative_values_are_zero(backend: Backend) -> None:
    x = torch.randn(3, 20)
    x[0], x[1] = 0, -200
    q, scale = backend.call("silu_quantize", x, None, None)
    assert not q[:2].any()
    assert (scale[:2] < 1e-12).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_its_own_scale_only(backend: Backend, value: float) -> None:
    x = torch.randn(4, 20)
    x[2, 7] = value
    _, scale = backend.call("silu_quantize", x, None, None)
    assert scale.isfinite().tolist() == [True, True, False, True]


@FEW_EXAMPLES
@given(batch=st.lists(st.integers(0, 5), max_size=3), channels=st.integers(1, 200), mode=st.sampled_from(MODES))
def test_any_shape(backend: Backend, batch: list[int], channels: int, mode: str) -> None:
    x = torch.randn(*batch, channels)
    if x.numel():
        check(backend, x, mode)
    else:
        inv_scale = torch.ones(1) if "inv_scale" in mode else None
        q, _ = backend.call("silu_quantize", x, inv_scale, None)
        assert q.shape == x.shape
