"""An int8 linear that quantizes its floating input itself, beside two launches and float."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import operands, shapes
from benchmarks.harness.cases import Case
from benchmarks.harness.timing import Variants
from ldmq_kernels import ops

SHAPE = shapes.LINEAR


def case(shape: shapes.Linear) -> Case:
    """One linear."""

    def make() -> Variants:
        ours = operands.operands_of("linear_static_w8a8", shape)
        x = ours.x

        def two_launches() -> torch.Tensor:
            x_q = ops.quantize_static(x, ours.inv_scale, -1)
            return ops.linear_w8a8(x_q, ours.x_scale, ours.weight, ours.weight_scale, ours.bias, None, x.dtype)

        variants = {"ldmq": operands.call_of("linear_static_w8a8", ours), "two_launches": two_launches}
        return variants | operands.float_linears(shape, x)

    return operands.linear_case("linear_static_w8a8", shape, make, bits=(8, 16), others=("two_launches",))


def cases() -> Iterator[Case]:
    """A case for each linear of the models."""
    return map(case, shapes.linears())
