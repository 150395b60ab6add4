"""Convolution with int4 weights on int8 activations, beside float."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import operands, shapes
from benchmarks.harness.cases import Case
from benchmarks.harness.timing import Variants

SHAPE = shapes.CONV2D


def case(shape: shapes.Conv2d) -> Case:
    """One convolution."""

    def make() -> Variants:
        ours = operands.call_of("conv2d_w4a8", operands.operands_of("conv2d_w4a8", shape))
        return {"ldmq": ours} | operands.float_convolutions(shape, operands.image(shape))

    return operands.conv2d_case("conv2d_w4a8", shape, make, bits=(4, 8))


def cases() -> Iterator[Case]:
    """A case for each convolution of the models."""
    return map(case, shapes.convolutions())
