"""int4 weights on floating activations, beside float."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import common, operands, shapes
from ldmq_kernels import ops
from ldmq_kernels.numerics.affine import quantize_weight_w4a16
from ldmq_kernels.numerics.packing import pack_int4


def _case(shape: shapes.Linear) -> common.Case:
    def make() -> common.Variants:
        x = operands.normal(shape.m, shape.k)
        integers, scale = quantize_weight_w4a16(torch.randn(shape.n, shape.k, device=x.device))
        weight = pack_int4(integers)
        return {"ldmq": lambda: ops.linear_w4a16(x, weight, scale, None)} | operands.float_linears(shape, x)

    described = {"M": shape.m, "K": shape.k, "N": shape.n}
    return common.Case("linear_w4a16", described, shape.count, operands.FLOAT_RIVALS, make, operands.linear_work(shape))


def cases() -> Iterator[common.Case]:
    """A case for each linear of the models."""
    return map(_case, shapes.linears())


test_linear_w4a16 = common.benchmark_test(cases)
