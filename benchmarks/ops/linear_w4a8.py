"""int4 weights on int8 activations, beside the int8 linear and float."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import cases as harness
from benchmarks.harness import operands, shapes
from benchmarks.harness.timing import Variants

SHAPE = shapes.LINEAR


def case(shape: shapes.Linear) -> harness.Case:
    """One linear."""

    def make() -> Variants:
        four, eight = operands.operands_of("linear_w4a8", shape), operands.operands_of("linear_w8a8", shape)
        ours = {"ldmq": operands.call_of("linear_w4a8", four), "ldmq_w8a8": operands.call_of("linear_w8a8", eight)}
        return ours | operands.float_linears(shape, operands.normal(shape.m, shape.k))

    return operands.linear_case("linear_w4a8", shape, make, bits=(4, 8), others=("ldmq_w8a8",))


def cases() -> Iterator[harness.Case]:
    """A case for each linear of the models."""
    return map(case, shapes.linears())


def summary(rows: list[dict]) -> dict[str, float | None]:
    """The weighted ratio to the int8 linear."""
    return {
        "linear_w4a8/geomean_vs_w8a8": harness.geometric_mean(rows, "ldmq_w8a8"),
        **harness.cuda_over_triton("linear_w4a8", rows),
    }
