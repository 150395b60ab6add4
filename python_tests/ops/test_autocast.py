"""Under autocast an op computes what it computes without: its backends choose the dtypes themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldmq_kernels import ops
from ldmq_kernels.ops import specs
from ldmq_kernels.ops.operands import Shape, example
from python_tests.nn.layers import LINEAR_SCHEMES, quantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", list(specs()))
def test_an_op_gives_the_same_bits(op: str, dtype: torch.dtype) -> None:
    shape = Shape(tokens=3, channels=72, out=4, picture=(1, 3, 3), options=specs()[op].optional - {"q_dtype"})
    arguments = example(op, shape, torch.device("cpu"), torch.float32)
    wanted = getattr(ops, op)(*arguments)
    with torch.autocast("cpu", dtype=dtype):
        found = getattr(ops, op)(*arguments)
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
def test_a_layer_is_differentiated_under_autocast(scheme: str) -> None:
    layer = quantized(nn.Linear(72, 4).requires_grad_(False), scheme)
    x = torch.randn(3, 72, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        out = layer(x)
        out.norm().backward()
    assert torch.equal(out, layer(x))
    assert bool(x.grad.isfinite().all())
    assert bool(x.grad.any())
