"""int4 weights on floating activations, beside float."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import operands, shapes
from benchmarks.harness.cases import Case
from benchmarks.harness.timing import Variants
from ldmq_kernels import ops
from ldmq_kernels.numerics.formats.int4 import pack_int4
from ldmq_kernels.numerics.formats.int4_grouped import quantize_weight_w4a16

SHAPE = shapes.LINEAR


def case(shape: shapes.Linear) -> Case:
    """One linear."""

    def make() -> Variants:
        x = operands.normal(shape.m, shape.k)
        integers, scale = quantize_weight_w4a16(torch.randn(shape.n, shape.k, device=x.device))
        weight = pack_int4(integers)
        return {"ldmq": lambda: ops.linear_w4a16(x, weight, scale, None)} | operands.float_linears(shape, x)

    return operands.linear_case("linear_w4a16", shape, make, bits=(4, 16))


def cases() -> Iterator[Case]:
    """A case for each linear of the models."""
    return map(case, shapes.linears())
