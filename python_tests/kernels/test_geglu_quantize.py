"""geglu_quantize is value * gelu(gate) and quantization in float32, but for one step near a tie, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from python_tests.kernels.operands import DTYPES, FEW_EXAMPLES, Backend, scrambled
from python_tests.kernels.producers import EPS, MODES, assert_quantized, factors, rounding


def check(backend: Backend, x: Tensor, mode: str) -> None:
    value, gate = x.double().chunk(2, -1)
    y = value * gate * torch.special.erfc(gate / -math.sqrt(2)) / 2
    error = 4 * EPS * (value * gate).abs() + rounding(backend, x.dtype, y)
    given_factors = factors(mode, y)
    assert_quantized(backend, *backend.call("geglu_quantize", x, *given_factors), y, error, *given_factors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17, 640), (3, 5, 40), (2, 5120), (63, 8), (5, 2), (1920,)])
@pytest.mark.parametrize("mode", MODES)
def test_is_the_definition(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], mode: str) -> None:
    x = (torch.randn(shape) * 2).to(dtype)
    check(backend, x, mode)
    check(backend, scrambled(x), mode)


def test_the_values_come_first_and_the_gates_after_them(backend: Backend) -> None:
    x = torch.tensor([[1.0, 2.0, -3.0, 100.0, 100.0, -100.0]])
    q, _ = backend.call("geglu_quantize", x, torch.tensor([0.1]), None)
    assert q.tolist() == [[10, 20, 0]]


def test_gates_over_the_whole_range_of_float16(backend: Backend) -> None:
    gate = torch.tensor([-65504, -300, -12, -6, -5.5, -4, -1e-4, -6e-8, 0, 6e-8, 0.7, 3, 6, 12, 300, 65504]).half()
    check(backend, torch.cat([torch.full_like(gate, 1e-3), gate]).view(1, -1), "inv_scales")


def test_a_row_of_zeros_has_a_positive_scale(backend: Backend) -> None:
    x = torch.randn(3, 40)
    x[1, :20] = 0
    q, scale = backend.call("geglu_quantize", x, None, None)
    assert not q[1].any()
    assert 0 < scale[1] < 1e-12


@pytest.mark.parametrize(("value", "channel"), [(torch.nan, 7), (torch.nan, 27), (torch.inf, 7)])
def test_what_is_not_finite_reaches_its_own_scale_only(backend: Backend, value: float, channel: int) -> None:
    x = torch.randn(4, 40)
    x[2, channel] = value
    _, scale = backend.call("geglu_quantize", x, None, None)
    assert scale.isfinite().tolist() == [True, True, False, True]


@FEW_EXAMPLES
@given(batch=st.lists(st.integers(0, 5), max_size=3), channels=st.integers(1, 200), mode=st.sampled_from(MODES))
def test_any_shape(backend: Backend, batch: list[int], channels: int, mode: str) -> None:
    x = torch.randn(*batch, 2 * channels)
    if x.numel():
        check(backend, x, mode)
    else:
        inv_scale = torch.ones(1) if "inv_scale" in mode else None
        q, _ = backend.call("geglu_quantize", x, inv_scale, None)
        assert q.shape == (*batch, channels)
