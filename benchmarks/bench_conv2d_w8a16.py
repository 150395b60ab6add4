"""Convolution with int8 weights on floating activations, beside float."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import common, operands, shapes
from ldmq_kernels import ops


def _case(shape: shapes.Conv2d) -> common.Case:
    def make() -> common.Variants:
        x, scale = operands.image(shape), operands.scales(shape.k)
        weight = operands.integers(shape.k, shape.kernel, shape.kernel, shape.c)
        ours = {"ldmq": lambda: ops.conv2d_w8a16(x, weight, scale, None, *operands.geometry(shape))}
        return ours | operands.float_convolutions(shape, x)

    return common.Case(
        "conv2d_w8a16", operands.described(shape), shape.count, operands.CONV_RIVALS, make, operands.conv2d_work(shape)
    )


def cases() -> Iterator[common.Case]:
    """A case for each convolution of the models."""
    return map(_case, shapes.convolutions())


test_conv2d_w8a16 = common.benchmark_test(cases)
