"""An int8 linear that quantizes its floating input itself, beside two launches and float."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import common, operands, shapes
from ldmq_kernels import ops


def _case(shape: shapes.Linear) -> common.Case:
    def make() -> common.Variants:
        x, weight = operands.normal(shape.m, shape.k), operands.linear_weight(shape.n, shape.k)
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

    described = {"M": shape.m, "K": shape.k, "N": shape.n}
    rivals = ("two_launches", *operands.FLOAT_RIVALS)
    work = operands.linear_work(shape)
    return common.Case("linear_static_w8a8", described, shape.count, rivals, make, work)


def cases() -> Iterator[common.Case]:
    """A case for each linear of the models."""
    return map(_case, shapes.linears())


test_linear_static_w8a8 = common.benchmark_test(cases)
