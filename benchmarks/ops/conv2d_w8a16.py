"""Convolution with int8 weights on floating activations, beside float."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import operands, shapes
from benchmarks.harness.cases import Case
from benchmarks.harness.timing import Variants

SHAPE = shapes.CONV2D


def case(shape: shapes.Conv2d) -> Case:
    """One convolution."""

    def make() -> Variants:
        ours = operands.operands_of("conv2d_w8a16", shape)
        return {"ldmq": operands.call_of("conv2d_w8a16", ours)} | operands.float_convolutions(shape, ours.x)

    return operands.conv2d_case("conv2d_w8a16", shape, make, bits=(8, 16))


def cases() -> Iterator[Case]:
    """A case for each convolution of the models."""
    return map(case, shapes.convolutions())
