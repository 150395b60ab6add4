"""int4 weights on int8 activations, beside the int8 linear and float."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import cases as harness
from benchmarks.harness import operands, shapes
from benchmarks.harness.timing import Variants
from ldmq_kernels import ops
from ldmq_kernels.numerics.formats.int4 import pack_int4
from ldmq_kernels.numerics.formats.int4_two_level import fold_multiplier, quantize_weight_w4a8

SHAPE = shapes.LINEAR


def case(shape: shapes.Linear) -> harness.Case:
    """One linear."""

    def make() -> Variants:
        x, x_q, x_scale = operands.normal(shape.m, shape.k), operands.integers(shape.m, shape.k), operands.scales(1)
        grouped = quantize_weight_w4a8(torch.randn(shape.n, shape.k, device=x.device))
        eight = operands.held_linear(fold_multiplier(grouped.integers, grouped.multiplier))
        four = pack_int4(grouped.integers) if x.is_cuda else eight
        more = (grouped.scale, None, None, x.dtype)
        ours = {
            "ldmq": lambda: ops.linear_w4a8(x_q, x_scale, four, grouped.multiplier, *more),
            "ldmq_w8a8": lambda: ops.linear_w8a8(x_q, x_scale, eight, *more),
        }
        return ours | operands.float_linears(shape, x)

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
