"""int8 weights on floating activations, beside float."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import operands, shapes
from benchmarks.harness.cases import Case
from benchmarks.harness.timing import Variants

SHAPE = shapes.LINEAR


def case(shape: shapes.Linear) -> Case:
    """One linear."""

    def make() -> Variants:
        ours = operands.operands_of("linear_w8a16", shape)
        return {"ldmq": operands.call_of("linear_w8a16", ours)} | operands.float_linears(shape, ours.x)

    return operands.linear_case("linear_w8a16", shape, make, bits=(8, 16))


def cases() -> Iterator[Case]:
    """A case for each linear of the models."""
    return map(case, shapes.linears())
