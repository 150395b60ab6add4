"""Convolution with int8 weights on floating activations, beside float."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import operands, shapes
from benchmarks.harness.cases import Case
from benchmarks.harness.timing import Variants
from ldmq_kernels import ops

SHAPE = shapes.CONV2D


def case(shape: shapes.Conv2d) -> Case:
    """One convolution."""

    def make() -> Variants:
        x, scale = operands.image(shape), operands.scales(shape.k)
        weight = operands.integers(shape.k, shape.kernel, shape.kernel, shape.c)
        ours = {"ldmq": lambda: ops.conv2d_w8a16(x, weight, scale, None, *operands.geometry(shape))}
        return ours | operands.float_convolutions(shape, x)

    return operands.conv2d_case("conv2d_w8a16", shape, make, bits=(8, 16))


def cases() -> Iterator[Case]:
    """A case for each convolution of the models."""
    return map(case, shapes.convolutions())
