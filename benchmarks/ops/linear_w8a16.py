"""int8 weights on floating activations, beside float."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import operands, shapes
from benchmarks.harness.cases import Case
from benchmarks.harness.timing import Variants
from ldmq_kernels import ops

SHAPE = shapes.LINEAR


def case(shape: shapes.Linear) -> Case:
    """One linear."""

    def make() -> Variants:
        x, scale = operands.normal(shape.m, shape.k), operands.scales(shape.n)
        weight = operands.integers(shape.n, shape.k)
        return {"ldmq": lambda: ops.linear_w8a16(x, weight, scale, None)} | operands.float_linears(shape, x)

    return operands.linear_case("linear_w8a16", shape, make, bits=(8, 16))


def cases() -> Iterator[Case]:
    """A case for each linear of the models."""
    return map(case, shapes.linears())
