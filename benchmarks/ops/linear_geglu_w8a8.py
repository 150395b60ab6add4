"""GEGLU and quantization in the epilogue of an int8 product, beside the two ops that it replaces, and float."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.harness import operands, shapes
from benchmarks.harness.baselines import compiled, lazily
from benchmarks.harness.cases import Case
from benchmarks.harness.machine import device
from benchmarks.harness.timing import Call, Variants
from ldmq_kernels import ops

SHAPE = shapes.LINEAR


def _gated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    value, gate = nn.functional.linear(x, weight, bias).chunk(2, dim=-1)
    return value * nn.functional.gelu(gate)


def _floats(shape: shapes.Linear, x: Tensor) -> Variants:
    """The float layer in each dtype, and compiled in the model's; nothing is quantized."""

    def build(dtype: torch.dtype) -> Call:
        layer, x_float = nn.Linear(shape.k, shape.n, device=device(), dtype=dtype), x.to(dtype)
        return lambda: _gated(x_float, layer.weight, layer.bias)

    def build_compiled() -> Call:
        layer = nn.Linear(shape.k, shape.n, device=device(), dtype=x.dtype)
        return lambda: compiled(_gated)(x, layer.weight, layer.bias)

    found: Variants = {name: lazily(lambda d=d: build(d)) for name, d in operands.FLOATS.items()}
    return found | {"compiled": lazily(build_compiled)}


def case_of(op: str, product: str, shape: shapes.Linear) -> Case:
    """A projection to values and gates, whose result is quantized to int8.

    Args:
        op: its name.
        product: the op of the product alone.
        shape: n values and gates together.
    """

    def make() -> Variants:
        ours, x = operands.operands_of(op, shape), operands.normal(shape.m, shape.k)
        plain = operands.operands_of(product, shape)

        def two_ops() -> Tensor:
            weight = plain.weight, plain.weight_scale, plain.bias
            hidden = getattr(ops, product)(plain.x_q, plain.x_scale, *weight, None, x.dtype)
            return ops.geglu_quantize(hidden, ours.out_inv_scale, None)[0]

        return {"ldmq": operands.call_of(op, ours), "two_ops": two_ops} | _floats(shape, x)

    m, k, n = shape.m, shape.k, shape.n
    baselines = (*operands.FLOATS, "compiled", "two_ops")
    moved = m * k + n * k + m * n // 2
    return Case(op, {"M": m, "K": k, "N": n}, shape.count, baselines, make, 2e-9 * m * k * n, moved)


def case(shape: shapes.Linear) -> Case:
    """One projection."""
    return case_of("linear_geglu_w8a8", "linear_w8a8", shape)


def cases() -> Iterator[Case]:
    """A case for each feed-forward of the models."""
    return map(case, shapes.geglus())
