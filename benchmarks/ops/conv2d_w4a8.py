"""Convolution with int4 weights on int8 activations, beside float."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import operands, shapes
from benchmarks.harness.cases import Case
from benchmarks.harness.timing import Variants
from ldmq_kernels import ops
from ldmq_kernels.numerics.formats.int4 import pack_int4
from ldmq_kernels.numerics.formats.int4_two_level import fold_multiplier, quantize_weight_w4a8

SHAPE = shapes.CONV2D


def case(shape: shapes.Conv2d) -> Case:
    """One convolution."""

    def make() -> Variants:
        x, x_scale, geometry = operands.image(shape), operands.scales(1), operands.geometry(shape)
        x_q = ops.quantize_static(x, torch.full((1,), 30.0, device=x.device), 1)
        grouped = quantize_weight_w4a8(torch.randn(shape.k, shape.kernel, shape.kernel, shape.c, device=x.device))
        if x.is_cuda:
            weight = pack_int4(grouped.integers)
        else:
            weight = operands.held_conv2d(fold_multiplier(grouped.integers, grouped.multiplier))
        more = (grouped.multiplier, grouped.scale, None, None, None, *geometry, x.dtype)
        ours = {"ldmq": lambda: ops.conv2d_w4a8(x_q, x_scale, weight, *more)}
        return ours | operands.float_convolutions(shape, x)

    return operands.conv2d_case("conv2d_w4a8", shape, make, bits=(4, 8))


def cases() -> Iterator[Case]:
    """A case for each convolution of the models."""
    return map(case, shapes.convolutions())
