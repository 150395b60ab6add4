"""linear_static_w8a8 is quantize_static and then linear_w8a8, bit for bit, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldmq_kernels.kernels.cpu.packing import pack_linear
from python_tests.kernels.operands import (
    DTYPES,
    FEW_EXAMPLES,
    Backend,
    assert_rounded_once,
    exact_epilogue,
    exact_linear,
    random_int8,
    random_scale,
    rounded_int8,
    scrambled,
)

ONE = torch.ones(1)


def quantized(x: Tensor, inv_scale: Tensor) -> Tensor:
    return torch.from_numpy(rounded_int8(x.float().numpy() * inv_scale.numpy()))


@pytest.mark.parametrize(  # a dtype is only loaded: one a shape, and all on two
    ("rows", "depth", "columns", "dtype"),
    [
        *((1, 4, 20, dtype) for dtype in DTYPES),
        *((17, 320, 63, dtype) for dtype in DTYPES),
        (140, 96, 330, torch.float16),
        (3, 2560, 4, torch.bfloat16),
        (130, 16, 700, torch.float32),
    ],
)
@pytest.mark.parametrize("smoothed", [False, True])
def test_accumulator_is_exact(
    backend: Backend, dtype: torch.dtype, rows: int, depth: int, columns: int, smoothed: bool
) -> None:
    x, weight = (torch.randn(rows, depth) * 2).to(dtype), random_int8(columns, depth)
    inv_scale = torch.rand(depth if smoothed else 1) * 40 + 1
    exact = exact_linear(quantized(x, inv_scale), weight)
    x_scale = ONE if dtype == torch.float32 else ONE / 2**10
    for given_x in (x, scrambled(x)):
        out = backend.call("linear_static_w8a8", given_x, inv_scale, x_scale, weight, torch.ones(columns), None, None)
        assert out.dtype == dtype
        if dtype == torch.float32:
            assert torch.equal(out.long(), exact)
        else:
            assert_rounded_once(out, *exact_epilogue(exact, x_scale))


@pytest.mark.parametrize("rows", [5, 150])
@pytest.mark.parametrize("columns", [70, 650])
def test_epilogue_rounds_once(backend: Backend, rows: int, columns: int) -> None:
    x, weight, inv_scale = torch.randn(2, rows, 64), random_int8(columns, 64), torch.rand(1) * 40
    x_scale, weight_scale = random_scale(1), random_scale(columns)
    bias, residual = torch.randn(columns), torch.randn(2, rows, columns)
    out = backend.call("linear_static_w8a8", x, inv_scale, x_scale, weight, weight_scale, bias, residual)
    accumulator = exact_linear(quantized(x, inv_scale), weight)
    assert_rounded_once(out, *exact_epilogue(accumulator, x_scale, weight_scale, terms=(bias, residual)))


def test_a_gate_multiplies_before_the_residual_is_added(backend: Backend) -> None:
    x, weight, inv_scale = torch.randn(2, 5, 64), random_int8(72, 64), torch.rand(1) * 40
    x_scale, weight_scale, bias = random_scale(1), random_scale(72), torch.randn(72)
    residual, gate = torch.randn(2, 5, 72), torch.randn(2, 1, 72)
    given = x, inv_scale, x_scale, weight, weight_scale, bias
    plain = backend.call("linear_static_w8a8", *given, None)
    out = backend.call("linear_static_w8a8", *given, residual, gate)
    assert torch.allclose(out, plain * gate + residual, rtol=1e-6, atol=1e-6)


def test_ties_round_to_even_and_values_clamp(backend: Backend) -> None:
    x = torch.tensor(
        [[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.0, 1e30, -torch.inf, 0.0, -0.49999997, 3, 4, 5, 6]]
    )
    wanted = torch.tensor([[0, 2, 2, 0, -2, 126, 127, -127, 127, -127, 0, 0, 3, 4, 5, 6]])
    out = backend.call("linear_static_w8a8", x, ONE, ONE, torch.eye(16, dtype=torch.int8), torch.ones(16), None, None)
    assert torch.equal(out.long(), wanted)


def test_a_packed_weight_gives_the_same_on_every_backend(backend: Backend) -> None:
    if backend.device.type != "cpu":
        pytest.skip("the CPU backend's layout is met on a CPU alone")
    x, weight, rest = torch.randn(5, 32), random_int8(8, 32), (random_scale(8), None, None)
    packed = backend.call("linear_static_w8a8", x, ONE, ONE, pack_linear(weight), *rest)
    assert torch.equal(packed, backend.call("linear_static_w8a8", x, ONE, ONE, weight, *rest))


@FEW_EXAMPLES
@given(batch=st.lists(st.integers(0, 5), max_size=3), depth=st.integers(1, 150), columns=st.integers(1, 150))
def test_any_shape(backend: Backend, batch: list[int], depth: int, columns: int) -> None:
    x, weight, inv_scale = torch.randn(*batch, depth), random_int8(columns, depth), torch.rand(depth) * 40
    out = backend.call("linear_static_w8a8", x, inv_scale, ONE, weight, torch.ones(columns), None, None)
    assert torch.equal(out.long(), exact_linear(quantized(x, inv_scale), weight))
