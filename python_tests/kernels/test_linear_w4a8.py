"""linear_w4a8: int4 decoded exactly, times its group's multiplier, exact integers, one rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmq_kernels.numerics.formats.int4 import pack_int4
from python_tests.kernels.operands import (
    DTYPES,
    FEW_EXAMPLES,
    Backend,
    assert_rounded_once,
    exact_epilogue,
    exact_linear,
    folded,
    random_int4,
    random_int8,
    random_multiplier,
    random_scale,
    scrambled,
)

ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 4, 20), (17, 320, 63), (63, 21, 320), (130, 960, 18), (2, 100, 7), (145, 352, 168)],
)
def test_accumulator_is_exact(backend: Backend, rows: int, depth: int, columns: int) -> None:
    x, weight, multiplier = random_int8(rows, depth), random_int4(columns, depth), random_multiplier(columns, depth)
    exact = exact_linear(x, folded(weight, multiplier))
    assert exact.abs().max() < 2**24
    packed, scale = pack_int4(weight), torch.ones(columns)
    for operand in (x, scrambled(x)):
        out = backend.call("linear_w4a8", operand, ONE, packed, multiplier, scale, None, None, torch.float32)
        assert torch.equal(out.long(), exact)


@pytest.mark.parametrize("depth", [130, 65])
def test_unit_vectors_read_every_nibble_and_multiplier(backend: Backend, depth: int) -> None:
    """Row n of the weight holds n - 7 in some places and its negative in others; all multipliers occur."""
    values = torch.arange(-7, 8, dtype=torch.int8).repeat(18)
    weight = values[:, None] * torch.randint(-1, 2, (1, depth), dtype=torch.int8)
    groups = -(-depth // 64)
    multiplier = torch.arange(1, 19, dtype=torch.uint8).repeat_interleave(15)[:, None].repeat(1, groups)
    multiplier[:, -1] = 19 - multiplier[:, -1]
    identity = torch.eye(depth, dtype=torch.int8)
    arguments = identity, ONE, pack_int4(weight), multiplier, torch.ones(len(values)), None, None, torch.float32
    assert torch.equal(backend.call("linear_w4a8", *arguments).long(), folded(weight, multiplier).T)


def test_no_sum_of_extremes_saturates(backend: Backend) -> None:
    x, weight = torch.full((2, 960), 127, dtype=torch.int8), torch.full((20, 960), -7, dtype=torch.int8)
    multiplier = torch.full((20, 15), 18, dtype=torch.uint8)
    arguments = x, ONE, pack_int4(weight), multiplier, torch.ones(20), None, None, torch.float32
    assert (backend.call("linear_w4a8", *arguments) == -960 * 127 * 126).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_epilogue_rounds_once(backend: Backend, dtype: torch.dtype, per_token: bool) -> None:
    x, weight, multiplier = random_int8(2, 17, 320), random_int4(70, 320), random_multiplier(70, 320)
    x_scale = random_scale(2, 17) if per_token else random_scale(1)
    weight_scale, bias, residual = random_scale(70), torch.randn(70).to(dtype), torch.randn(2, 17, 70).to(dtype)
    arguments = x, x_scale, pack_int4(weight), multiplier, weight_scale, bias, residual, dtype
    factors = x_scale.unsqueeze(-1), weight_scale
    exact = exact_epilogue(exact_linear(x, folded(weight, multiplier)), *factors, terms=(bias, residual))
    assert_rounded_once(backend.call("linear_w4a8", *arguments), *exact)


def test_a_gate_multiplies_before_the_residual_is_added(backend: Backend) -> None:
    x, weight, multiplier = random_int8(2, 5, 64), random_int4(72, 64), random_multiplier(72, 64)
    given = random_scale(2, 5), pack_int4(weight), multiplier, random_scale(72), torch.randn(72)
    residual, gate = torch.randn(2, 5, 72), torch.randn(2, 1, 72)
    plain = backend.call("linear_w4a8", x, *given, None, torch.float32)
    out = backend.call("linear_w4a8", x, *given, residual, torch.float32, gate)
    assert torch.allclose(out, plain * gate + residual, rtol=1e-6, atol=1e-6)


@FEW_EXAMPLES
@given(batch=st.lists(st.integers(0, 5), max_size=3), depth=st.integers(1, 150), columns=st.integers(1, 150))
def test_any_shape(backend: Backend, batch: list[int], depth: int, columns: int) -> None:
    x, weight, multiplier = random_int8(*batch, depth), random_int4(columns, depth), random_multiplier(columns, depth)
    arguments = x, ONE, pack_int4(weight), multiplier, torch.ones(columns), None, None, torch.float32
    assert torch.equal(backend.call("linear_w4a8", *arguments).long(), exact_linear(x, folded(weight, multiplier)))
