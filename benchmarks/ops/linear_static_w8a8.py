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
        x = operands.normal(shape.m, shape.k)
        weight = operands.held_linear(operands.integers(shape.n, shape.k))
        scale, x_scale = operands.scales(shape.n), operands.scales(1)
        inv_scale = torch.full((1,), 30.0, device=x.device)

        def two_launches() -> torch.Tensor:
            x_q = ops.quantize_static(x, inv_scale, -1)
            return ops.linear_w8a8(x_q, x_scale, weight, scale, None, None, x.dtype)

        ours = {
            "ldmq": lambda: ops.linear_static_w8a8(x, inv_scale, x_scale, weight, scale, None, None),
            "two_launches": two_launches,
        }
        return ours | operands.float_linears(shape, x)

    return operands.linear_case("linear_static_w8a8", shape, make, bits=(8, 16), others=("two_launches",))


def cases() -> Iterator[Case]:
    """A case for each linear of the models."""
    return map(case, shapes.linears())
