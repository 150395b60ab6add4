"""int4 weights on int8 activations, beside the int8 linear and float."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import common, operands, shapes
from ldmq_kernels import ops
from ldmq_kernels.kernels.cpu.packing import pack_linear
from ldmq_kernels.numerics.affine import fold_multiplier, quantize_weight_w4a8
from ldmq_kernels.numerics.packing import pack_int4


def _case(shape: shapes.Linear) -> common.Case:
    def make() -> common.Variants:
        x, x_q, x_scale = operands.normal(shape.m, shape.k), operands.integers(shape.m, shape.k), operands.scales(1)
        grouped = quantize_weight_w4a8(torch.randn(shape.n, shape.k, device=x.device))
        folded = fold_multiplier(grouped.integers, grouped.multiplier)
        four = pack_int4(grouped.integers) if x.is_cuda else pack_linear(folded)
        eight = folded if x.is_cuda else four
        more = (grouped.scale, None, None, x.dtype)
        return {
            "ldmq": lambda: ops.linear_w4a8(x_q, x_scale, four, grouped.multiplier, *more),
            "ldmq_w8a8": lambda: ops.linear_w8a8(x_q, x_scale, eight, *more),
        } | operands.float_linears(shape, x)

    described = {"M": shape.m, "K": shape.k, "N": shape.n}
    rivals = ("ldmq_w8a8", *operands.FLOAT_RIVALS)
    return common.Case("linear_w4a8", described, shape.count, rivals, make, operands.linear_work(shape))


def cases() -> Iterator[common.Case]:
    """A case for each linear of the models."""
    return map(_case, shapes.linears())


def summary(rows: list[dict]) -> dict[str, float | None]:
    """The weighted ratio to the int8 linear."""
    return {
        "linear_w4a8/geomean_vs_w8a8": common.geometric_mean(rows, "ldmq_w8a8"),
        **common.cuda_over_triton("linear_w4a8", rows),
    }


test_linear_w4a8 = common.benchmark_test(cases)
