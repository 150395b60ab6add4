"""linear_w8a8: exact integers, one rounding, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    scrambled,
)

ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 4, 20), (17, 320, 63), (63, 20, 320), (130, 960, 18), (4097, 20, 17), (3, 2560, 4), (145, 336, 168)],
)
def test_accumulator_is_exact(backend: Backend, rows: int, depth: int, columns: int) -> None:
    x, weight = random_int8(rows, depth), random_int8(columns, depth)
    exact = exact_linear(x, weight)
    assert exact.abs().max() < 2**24
    for operand in (x, scrambled(x)):
        out = backend.call("linear_w8a8", operand, ONE, weight, torch.ones(columns), None, None, torch.float32)
        assert torch.equal(out.long(), exact)


@pytest.mark.parametrize("sign", [1, -1])
def test_no_sum_of_extremes_saturates(backend: Backend, sign: int) -> None:
    """Adjacent products of 127 * 127 overflow int16, which is what CPUs without VNNI add in."""
    x, weight = torch.full((2, 960), 127, dtype=torch.int8), torch.full((20, 960), sign * 127, dtype=torch.int8)
    out = backend.call("linear_w8a8", x, ONE, weight, torch.ones(20), None, None, torch.float32)
    assert (out == sign * 960 * 127 * 127).all()


def test_sums_above_2_to_24_round_to_nearest(backend: Backend) -> None:
    x, weight = torch.full((1, 2560), 127, dtype=torch.int8), torch.full((4, 2560), 127, dtype=torch.int8)
    weight[torch.arange(4), torch.arange(4)] = torch.tensor([126, 125, 124, 123], dtype=torch.int8)
    out = backend.call("linear_w8a8", x, ONE, weight, torch.ones(4), None, None, torch.float32)
    assert torch.equal(out, exact_linear(x, weight).float())


def test_unit_vectors_read_the_weight(backend: Backend) -> None:
    weight = random_int8(63, 130)
    identity = torch.eye(130, dtype=torch.int8)
    out = backend.call("linear_w8a8", identity, ONE, weight, torch.ones(63), None, None, torch.float32)
    assert torch.equal(out, weight.T.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_epilogue_rounds_once(
    backend: Backend, dtype: torch.dtype, per_token: bool, with_bias: bool, with_residual: bool
) -> None:
    x, weight = random_int8(2, 17, 320), random_int8(70, 320)
    x_scale = random_scale(2, 17) if per_token else random_scale(1)
    weight_scale = random_scale(70)
    bias = torch.randn(70).to(dtype) if with_bias else None
    residual = scrambled(torch.randn(2, 17, 70).to(dtype)) if with_residual else None
    out = backend.call("linear_w8a8", x, x_scale, weight, weight_scale, bias, residual, dtype)
    factors = x_scale.unsqueeze(-1), weight_scale
    assert_rounded_once(out, *exact_epilogue(exact_linear(x, weight), *factors, terms=(bias, residual)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", [(2, 1), (1, 1), (2, 17)], ids=["of samples", "one", "of tokens"])
def test_a_gate_multiplies_before_the_residual_is_added(
    backend: Backend, dtype: torch.dtype, gates: tuple[int, int]
) -> None:
    x, weight = random_int8(2, 17, 320), random_int8(72, 320)
    x_scale, weight_scale, bias = random_scale(2, 17), random_scale(72), torch.randn(72).to(dtype)
    gate_dtype = torch.float32 if dtype == torch.bfloat16 else dtype  # of the output, which CUDA takes, and another
    residual, gate = torch.randn(2, 17, 72).to(dtype), scrambled(torch.randn(*gates, 72).to(gate_dtype))
    for added in (residual, None):
        out = backend.call("linear_w8a8", x, x_scale, weight, weight_scale, bias, added, dtype, gate)
        product, magnitude = exact_epilogue(exact_linear(x, weight), x_scale.unsqueeze(-1), weight_scale, terms=(bias,))
        exact, magnitude = product * gate.double(), magnitude * gate.double().abs()
        if added is not None:
            exact, magnitude = exact + added.double(), magnitude + added.double().abs()
        assert_rounded_once(out, exact, magnitude, steps=6)


def test_a_gate_of_other_rows_is_refused(backend: Backend) -> None:
    x, weight = random_int8(3, 32), random_int8(16, 32)
    for gate in (torch.randn(2, 16), torch.randn(3, 15)):
        with pytest.raises(RuntimeError):
            backend.call("linear_w8a8", x, ONE, weight, torch.ones(16), None, None, torch.float32, gate)


@pytest.mark.parametrize("runs", [0, 1])
def test_an_empty_batch_has_a_gate_of_no_rows_or_of_one(backend: Backend, runs: int) -> None:
    x, weight, gate = random_int8(0, 5, 32), random_int8(16, 32), torch.randn(runs, 1, 16)
    out = backend.call("linear_w8a8", x, ONE, weight, torch.ones(16), None, None, torch.float16, gate)
    assert (out.shape, out.dtype) == ((0, 5, 16), torch.float16)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 3, 5), (2, 1, 3, 2)])
def test_tokens_may_have_any_number_of_axes(backend: Backend, batch: tuple[int, ...]) -> None:
    x, weight, weight_scale = random_int8(*batch, 32), random_int8(20, 32), random_scale(20)
    x_scale, residual = random_scale(*batch), torch.randn(*batch, 20)
    out = backend.call("linear_w8a8", x, x_scale, weight, weight_scale, None, residual, torch.float32)
    exact = exact_epilogue(exact_linear(x, weight), x_scale.unsqueeze(-1), weight_scale, terms=(residual,))
    assert_rounded_once(out, *exact)


def test_a_packed_weight_gives_the_same_on_every_backend(backend: Backend) -> None:
    if backend.device.type != "cpu":
        pytest.skip("the CPU backend's layout is met on a CPU alone")
    x, weight, scale = random_int8(5, 32), random_int8(8, 32), random_scale(8)
    arguments = x, random_scale(1), weight, scale, None, None, torch.float32
    packed = *arguments[:2], pack_linear(weight), *arguments[3:]
    assert torch.equal(backend.call("linear_w8a8", *packed), backend.call("linear_w8a8", *arguments))


@FEW_EXAMPLES
@given(batch=st.lists(st.integers(0, 5), max_size=3), depth=st.integers(1, 150), columns=st.integers(1, 150))
def test_any_shape(backend: Backend, batch: list[int], depth: int, columns: int) -> None:
    x, weight = random_int8(*batch, depth), random_int8(columns, depth)
    x_scale, weight_scale, bias = random_scale(*batch), random_scale(columns), torch.randn(columns)
    out = backend.call("linear_w8a8", x, x_scale, weight, weight_scale, bias, None, torch.float32)
    factors = x_scale.unsqueeze(-1), weight_scale
    assert_rounded_once(out, *exact_epilogue(exact_linear(x, weight), *factors, terms=(bias,)))


def test_scales_and_bias_may_have_any_strides(backend: Backend) -> None:
    x, weight, scale = random_int8(5, 20), random_int8(7, 20), random_scale(7, 3)
    for column in (scale[:, 1], scale[:1, 0].expand(7)):
        strided = backend.call("linear_w8a8", x, ONE, weight, column, column, None, torch.float32)
        dense = column.contiguous()
        assert torch.equal(strided, backend.call("linear_w8a8", x, ONE, weight, dense, dense, None, torch.float32))
