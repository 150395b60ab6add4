"""linear_w4a16: int4 decoded exactly, each group with its own scale; float32 sums; one rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldmq_kernels.numerics.formats.int4 import pack_int4
from python_tests.kernels.operands import (
    DTYPES,
    FEW_EXAMPLES,
    Backend,
    assert_weight_only,
    exact_linear,
    random_int4,
    random_scale,
    scrambled,
)


def restored(weight: Tensor, group_scale: Tensor) -> Tensor:
    """The weight in float64."""
    return weight.double() * group_scale.double()[:, torch.arange(weight.shape[1]) // 64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 4, 20), (17, 448, 33), (63, 21, 140), (130, 80, 18)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rounds_once(
    backend: Backend, dtype: torch.dtype, rows: int, depth: int, columns: int, with_bias: bool
) -> None:
    x, weight = torch.randn(rows, depth).to(dtype), random_int4(columns, depth)
    scale = random_scale(columns, -(-depth // 64))
    bias = torch.randn(columns).to(dtype) if with_bias else None
    shift = torch.zeros(columns).double() if bias is None else bias.double()
    exact = exact_linear(x, restored(weight, scale)) + shift
    magnitude = exact_linear(x.abs(), restored(weight, scale).abs()) + shift.abs()
    in_torch = torch.nn.functional.linear(x, restored(weight, scale).to(dtype), bias)
    for operand in (x, scrambled(x)):
        out = backend.call("linear_w4a16", operand, pack_int4(weight), scale, bias)
        assert_weight_only(backend, out, exact, magnitude, in_torch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [130, 65])
def test_unit_vectors_read_every_nibble_with_the_scale_of_its_group(
    backend: Backend, dtype: torch.dtype, depth: int
) -> None:
    weight = torch.arange(-7, 8, dtype=torch.int8)[:, None].repeat(1, depth)
    weight[:, 1::2] = -weight[:, 1::2].flip(0) + random_int4(1)
    weight = weight.clamp(-7, 7)
    scale = torch.exp2(torch.arange(-(-depth // 64)).float()).repeat(15, 1)
    out = backend.call("linear_w4a16", torch.eye(depth).to(dtype), pack_int4(weight), scale, None)
    assert torch.equal(out, restored(weight, scale).T.to(dtype))


@FEW_EXAMPLES
@given(batch=st.lists(st.integers(0, 5), max_size=3), depth=st.integers(1, 150), columns=st.integers(1, 150))
def test_any_shape(backend: Backend, batch: list[int], depth: int, columns: int) -> None:
    x, weight = torch.randn(*batch, depth), random_int4(columns, depth)
    scale = random_scale(columns, -(-depth // 64))
    exact, magnitude = (exact_linear(f(x), f(restored(weight, scale))) for f in (Tensor.clone, Tensor.abs))
    in_torch = torch.nn.functional.linear(x, restored(weight, scale).float())
    out = backend.call("linear_w4a16", x, pack_int4(weight), scale, None)
    assert_weight_only(backend, out, exact, magnitude, in_torch)
