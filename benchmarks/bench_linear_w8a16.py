"""int8 weights on floating activations, beside float."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import common, operands, shapes
from ldmq_kernels import ops


def _case(shape: shapes.Linear) -> common.Case:
    def make() -> common.Variants:
        x, weight, scale = (
            operands.normal(shape.m, shape.k),
            operands.integers(shape.n, shape.k),
            operands.scales(shape.n),
        )
        return {"ldmq": lambda: ops.linear_w8a16(x, weight, scale, None)} | operands.float_linears(shape, x)

    described = {"M": shape.m, "K": shape.k, "N": shape.n}
    return common.Case("linear_w8a16", described, shape.count, operands.FLOAT_RIVALS, make, operands.linear_work(shape))


def cases() -> Iterator[common.Case]:
    """A case for each linear of the models."""
    return map(_case, shapes.linears())


test_linear_w8a16 = common.benchmark_test(cases)
