"""linear_w8a16: int8 weights enter the product exactly; float32 sums; one rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from python_tests.kernels.operands import (
    DTYPES,
    FEW_EXAMPLES,
    Backend,
    assert_weight_only,
    exact_linear,
    random_int8,
    random_scale,
    scrambled,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 4, 20), (17, 448, 33), (63, 20, 140), (130, 80, 18)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rounds_once(
    backend: Backend, dtype: torch.dtype, rows: int, depth: int, columns: int, with_bias: bool
) -> None:
    x, weight, scale = torch.randn(rows, depth).to(dtype), random_int8(columns, depth), random_scale(columns)
    bias = torch.randn(columns).to(dtype) if with_bias else None
    shift = torch.zeros(columns).double() if bias is None else bias.double()
    exact = exact_linear(x, weight) * scale + shift
    magnitude = exact_linear(x.abs(), weight.abs()) * scale + shift.abs()
    in_torch = torch.nn.functional.linear(x, (weight * scale[:, None]).to(dtype), bias)
    for operand in (x, scrambled(x)):
        out = backend.call("linear_w8a16", operand, weight, scale, bias)
        assert_weight_only(backend, out, exact, magnitude, in_torch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_vectors_read_the_weight(backend: Backend, dtype: torch.dtype) -> None:
    weight = random_int8(63, 130)
    weight[:, 0] = torch.arange(-31, 32) * 4 + 3
    out = backend.call("linear_w8a16", torch.eye(130).to(dtype), weight, torch.ones(63), None)
    assert torch.equal(out, weight.T.to(dtype))


def test_sums_beyond_float16_do_not_overflow(backend: Backend) -> None:
    x, weight = torch.full((2, 320), 100.0).half(), torch.full((4, 320), 127, dtype=torch.int8)
    out = backend.call("linear_w8a16", x, weight, torch.full((4,), 1e-3), None)
    assert (out - 4064).abs().max() <= 2


@FEW_EXAMPLES
@given(batch=st.lists(st.integers(0, 5), max_size=3), depth=st.integers(1, 150), columns=st.integers(1, 150))
def test_any_shape(backend: Backend, batch: list[int], depth: int, columns: int) -> None:
    x, weight, scale = torch.randn(*batch, depth), random_int8(columns, depth), random_scale(columns)
    exact = exact_linear(x, weight) * scale
    magnitude = exact_linear(x.abs(), weight.abs()) * scale
    in_torch = torch.nn.functional.linear(x, weight * scale[:, None])
    assert_weight_only(backend, backend.call("linear_w8a16", x, weight, scale, None), exact, magnitude, in_torch)
