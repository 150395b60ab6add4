"""linear_geglu_fp8: GEGLU of the FP8 product in float32, rounded once or quantized, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

from ldmq_kernels.kernels.agreement import AFTER_FLOAT8_SUMS
from python_tests.kernels.operands import (
    Backend,
    exact_linear,
    random_float8,
    random_scale,
    rounded_float8,
    rounded_int8,
)

FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("out_dtype", "rows", "depth", "columns"),
    [(torch.float16, 17, 48, 72), (torch.int8, 17, 48, 72), (FLOAT8, 17, 48, 72), (FLOAT8, 70, 68, 5)],
)
def test_is_the_product_gated_and_rounded_once(
    backend: Backend, out_dtype: torch.dtype, rows: int, depth: int, columns: int
) -> None:
    x, weight = random_float8(2, rows, depth), random_float8(2 * columns, depth)
    x_scale, weight_scale, bias = random_scale(2, rows), random_scale(2 * columns), torch.randn(2 * columns).half()
    product = exact_linear(x, weight).double() * x_scale.double().unsqueeze(-1) * weight_scale.double() + bias.double()
    value, gate = product.chunk(2, -1)
    exact = value * gate * torch.special.erfc(gate / -math.sqrt(2)) / 2
    inv_scale = None
    if out_dtype != torch.float16:
        inv_scale = torch.full((columns,), 200 / float(exact.abs().max()))
        exact = exact * inv_scale.double()
    out = backend.call("linear_geglu_fp8", x, x_scale, weight, weight_scale, bias, inv_scale, out_dtype)
    wanted = exact.half()
    if out_dtype != torch.float16:
        rounded = exact.float().numpy()
        wanted = torch.as_tensor(rounded_int8(rounded) if out_dtype == torch.int8 else rounded_float8(rounded))
    assert not AFTER_FLOAT8_SUMS.difference(out, wanted)
    assert float(wanted.float().abs().max()) > 100 * float(inv_scale is not None)


def test_operands_of_int8_are_refused(backend: Backend) -> None:
    x, weight, scale = random_float8(3, 32), random_float8(16, 32).float().to(torch.int8), torch.ones(16)
    if backend.name == "reference":
        pytest.skip("the definition multiplies what it is given")
    with pytest.raises(RuntimeError, match=r"int8.*this layer takes torch\.float8_e4m3fn|dtype"):
        backend.call("linear_geglu_fp8", x, torch.ones(1), weight, scale, None, None, torch.float16)
