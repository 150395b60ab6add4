"""linear_geglu_w8a8: values beside their own gates, gated in float32 and rounded once, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from python_tests.kernels.operands import (
    DTYPES,
    FEW_EXAMPLES,
    Backend,
    exact_linear,
    random_int8,
    random_scale,
    rounded_float8,
    rounded_int8,
    scrambled,
)

ONE, FLOAT8 = torch.ones(1), torch.float8_e4m3fn
EPS = 2.0**-24


def gated(product: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """value * gelu(gate) in float64 of a product, and how far float32 may be from it."""
    value, gate = product.chunk(2, -1)
    out = value * gate * torch.special.erfc(gate / -math.sqrt(2)) / 2
    of_value, of_gate = magnitude.chunk(2, -1)
    return out, 6 * EPS * (of_value * gate.abs() + 2 * value.abs() * of_gate + (value * gate).abs())


def assert_gated(out: Tensor, exact: Tensor, error: Tensor, inv_scale: Tensor | None) -> None:
    """Within the float error and one rounding to the output's dtype; quantized values on the right side of it."""
    assert exact.shape == out.shape
    if inv_scale is None:
        info = torch.finfo(out.dtype)
        half_unit = exact.abs() * info.eps / 2 + info.smallest_normal * info.eps
        assert bool(((out.double() - exact).abs() <= error + half_unit * (1 + 1e-6)).all())
        return
    scaled, error = exact * inv_scale.double(), (error + EPS * exact.abs()) * inv_scale.double()
    bounds = [(scaled + side).float().numpy() for side in (-error, error)]
    low, high = (rounded_int8(b) if out.dtype == torch.int8 else rounded_float8(b) for b in bounds)
    low, high = (torch.as_tensor(b).float() for b in (low, high))
    assert bool(((low <= out.float()) & (out.float() <= high)).all())


@pytest.mark.parametrize("columns", [8, 40, 136])
def test_unit_vectors_find_each_value_beside_its_own_gate(backend: Backend, columns: int) -> None:
    """GELU hands on what is far above 0, so that each output is the product of its own pair, of which no two are."""
    place = torch.arange(columns)
    value, gate = 1 + place % 120, 20 + place % 97
    weight = torch.zeros(2 * columns, 16, dtype=torch.int8)
    weight[place, place % 16], weight[columns + place, place % 16] = value.to(torch.int8), gate.to(torch.int8)
    x = torch.eye(16, dtype=torch.int8)
    out = backend.call("linear_geglu_w8a8", x, ONE, weight, torch.ones(2 * columns), None, None, torch.float32)
    wanted = torch.zeros(16, columns)
    wanted[place % 16, place] = (value * gate).float()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("out_dtype", "rows", "depth", "columns"),
    [(dtype, 17, 48, 72) for dtype in (*DTYPES, torch.int8, FLOAT8)] + [(torch.int8, 70, 68, 5), (FLOAT8, 1, 272, 136)],
)
def test_is_the_product_gated_and_rounded_once(
    backend: Backend, out_dtype: torch.dtype, rows: int, depth: int, columns: int
) -> None:
    is_quantized, per_row = out_dtype in (torch.int8, FLOAT8), rows > 1
    x, weight = random_int8(2, rows, depth), random_int8(2 * columns, depth)
    x_scale, weight_scale = random_scale(2, rows) if per_row else random_scale(1), random_scale(2 * columns)
    bias = torch.randn(2 * columns).half() if per_row else None
    inv_scale = torch.rand(columns if per_row else 1) * 3 + 3 if is_quantized else None
    given = scrambled(x) if per_row else x
    out = backend.call("linear_geglu_w8a8", given, x_scale, weight, weight_scale, bias, inv_scale, out_dtype)
    product = exact_linear(x, weight).double() * x_scale.double().unsqueeze(-1) * weight_scale.double()
    magnitude = product.abs()
    if bias is not None:
        product, magnitude = product + bias.double(), magnitude + bias.double().abs()
    exact, error = gated(product, magnitude)
    assert_gated(out, exact, error, inv_scale)


def test_the_next_layers_values_saturate_symmetrically(backend: Backend) -> None:
    x, weight = torch.full((2, 64), 127, dtype=torch.int8), torch.full((16, 64), 127, dtype=torch.int8)
    weight[:4] = -127
    for dtype, largest in ((torch.int8, 127), (FLOAT8, 448)):
        out = backend.call("linear_geglu_w8a8", x, ONE, weight, torch.ones(16), None, ONE, dtype)
        assert out.float().tolist() == [[-largest] * 4 + [largest] * 4] * 2


def test_operands_that_do_not_fit_are_refused(backend: Backend) -> None:
    x, weight, scale = random_int8(3, 32), random_int8(16, 32), torch.ones(16)
    for inv_scale, dtype in ((torch.ones(16), torch.int8), (None, torch.int8), (ONE, torch.float16)):
        with pytest.raises((RuntimeError, ValueError), match="inverse scale"):
            backend.call("linear_geglu_w8a8", x, ONE, weight, scale, None, inv_scale, dtype)


@settings(FEW_EXAMPLES, max_examples=4)
@given(batch=st.lists(st.integers(0, 5), max_size=3), depth=st.integers(1, 150), columns=st.integers(1, 150))
def test_any_shape(backend: Backend, batch: list[int], depth: int, columns: int) -> None:
    x, weight, scale = random_int8(*batch, depth), random_int8(2 * columns, depth), random_scale(2 * columns)
    out = backend.call("linear_geglu_w8a8", x, ONE, weight, scale, None, None, torch.float32)
    product = exact_linear(x, weight).double() * scale.double()
    assert_gated(out, *gated(product, product.abs()), None)
