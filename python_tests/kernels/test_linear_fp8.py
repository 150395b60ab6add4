"""linear_fp8: every e4m3 value is read as it is, sums are float32's, and the epilogue rounds once, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldmq_kernels.kernels.cpu.widened import pack_linear_float8, unpack_linear_float8
from python_tests.kernels.operands import (
    DTYPES,
    FEW_EXAMPLES,
    Backend,
    assert_float8_sum,
    exact_epilogue,
    exact_linear,
    random_float8,
    random_scale,
    scrambled,
)

ONE, FLOAT8 = torch.ones(1), torch.float8_e4m3fn
EVERY_VALUE = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127].view(FLOAT8)  # but for NaN


def magnitude_of(x: Tensor, weight: Tensor) -> Tensor:
    """The sum of the sizes of all products."""
    return exact_linear(x.float().abs(), weight.float().abs())


def test_unit_vectors_read_every_value_of_the_weight(backend: Backend) -> None:
    weight = EVERY_VALUE.repeat(8)[: 16 * 112].view(112, 16)
    identity = torch.eye(16).to(FLOAT8)
    out = backend.call("linear_fp8", identity, ONE, weight, torch.ones(112), None, None, torch.float32)
    assert torch.equal(out, weight.T.float())


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 4, 24), (63, 20, 320), (130, 960, 18), (3, 2560, 8), (145, 336, 168)]
)
def test_sums_are_those_of_float32(backend: Backend, rows: int, depth: int, columns: int) -> None:
    x, weight = random_float8(rows, depth), random_float8(columns, depth)
    exact, magnitude = exact_linear(x, weight), magnitude_of(x, weight)
    for operand in (x, scrambled(x)):
        out = backend.call("linear_fp8", operand, ONE, weight, torch.ones(columns), None, None, torch.float32)
        assert_float8_sum(backend, out, exact, magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", ["", "bias residual", "bias residual gate"])
def test_epilogue_rounds_once(backend: Backend, dtype: torch.dtype, terms: str) -> None:
    x, weight = random_float8(2, 17, 320), random_float8(72, 320)
    x_scale, weight_scale = random_scale(2, 17) if terms else random_scale(1), random_scale(72)
    bias = torch.randn(72).to(dtype) if "bias" in terms else None
    residual = scrambled(torch.randn(2, 17, 72).to(dtype)) if "residual" in terms else None
    gate = torch.randn(2, 1, 72).to(dtype) if "gate" in terms else None
    out = backend.call("linear_fp8", x, x_scale, weight, weight_scale, bias, residual, dtype, gate)
    factors = x_scale.unsqueeze(-1), weight_scale
    exact = exact_epilogue(exact_linear(x, weight), *factors, terms=(bias,))[0]
    magnitude = exact_epilogue(magnitude_of(x, weight), *factors, terms=(bias,))[1]
    if gate is not None:
        exact, magnitude = exact * gate.double(), magnitude * gate.double().abs()
    if residual is not None:
        exact, magnitude = exact + residual.double(), magnitude + residual.double().abs()
    assert_float8_sum(backend, out, exact, magnitude)


def test_extremes_neither_saturate_nor_overflow(backend: Backend) -> None:
    x, weight = torch.full((2, 960), 448.0).to(FLOAT8), torch.full((24, 960), -448.0).to(FLOAT8)
    out = backend.call("linear_fp8", x, ONE, weight, torch.ones(24), None, None, torch.float32)
    assert_float8_sum(backend, out, torch.full((2, 24), -960.0 * 448 * 448).double(), out.double().abs())


def test_nan_reaches_its_own_row_and_column_only(backend: Backend) -> None:
    if backend.name == "triton" and backend.device.type == "cpu":
        pytest.skip("Triton's interpreter reads the NaN of e4m3 as 480")
    x, weight = random_float8(4, 32), random_float8(16, 32)
    x.view(torch.uint8)[1, 5] = weight.view(torch.uint8)[2, 9] = 0x7F
    out = backend.call("linear_fp8", x, ONE, weight, torch.ones(16), None, None, torch.float32)
    wanted = torch.zeros(4, 16, dtype=torch.bool)
    wanted[1] = wanted[:, 2] = True
    assert torch.equal(out.isnan(), wanted)


def test_operands_that_do_not_fit_are_refused(backend: Backend) -> None:
    x, weight, scale = random_float8(3, 32), random_float8(16, 32), torch.ones(16)
    for wrong in ((x, random_float8(16, 48)), (x, weight, torch.randn(2, 16)), (x, weight, torch.randn(3, 15))):
        with pytest.raises(RuntimeError):
            backend.call("linear_fp8", wrong[0], ONE, wrong[1], scale, None, None, torch.float32, *wrong[2:])


def test_a_widened_weight_gives_the_same_on_every_backend(backend: Backend) -> None:
    if backend.device.type != "cpu":
        pytest.skip("the CPU backend's layout is met on a CPU alone")
    x, weight = random_float8(5, 32), EVERY_VALUE[: 8 * 31].view(8, 31)[:, :16].repeat(1, 2).contiguous()
    packed = pack_linear_float8(weight)
    assert torch.equal(unpack_linear_float8(packed).view(torch.uint8), weight.view(torch.uint8))
    outs = [backend.call("linear_fp8", x, ONE, w, torch.ones(8), None, None, torch.float32) for w in (weight, packed)]
    assert torch.equal(*outs)


@settings(FEW_EXAMPLES, max_examples=4)  # of shapes, int8 tries more
@given(batch=st.lists(st.integers(0, 5), max_size=3), depth=st.integers(1, 150), columns=st.integers(1, 150))
def test_any_shape(backend: Backend, batch: list[int], depth: int, columns: int) -> None:
    x, weight = random_float8(*batch, depth), random_float8(columns, depth)
    out = backend.call("linear_fp8", x, ONE, weight, torch.ones(columns), None, None, torch.float32)
    assert_float8_sum(backend, out, exact_linear(x, weight), magnitude_of(x, weight))
