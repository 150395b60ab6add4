"""Quantization with each token's own scale, beside its definition in eager torch and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import common, operands, shapes
from ldmq_kernels import ops
from ldmq_kernels.kernels import reference

RIVALS = ("eager", "copy")


def _case(shape: shapes.Linear) -> common.Case:
    def make() -> common.Variants:
        x = operands.normal(shape.m, shape.k)
        return {
            "ldmq": lambda: ops.quantize_per_token(x, None),
            "eager": lambda: reference.quantize_per_token(x, None),
            "copy": x.clone,
        }

    described = {"M": shape.m, "K": shape.k}
    elements = shape.m * shape.k
    moved = elements * (torch.finfo(operands.DTYPE).bits // 8 + 1)
    return common.Case("quantize_per_token", described, shape.count, RIVALS, make, moved=moved)


def cases() -> Iterator[common.Case]:
    """A case for each linear's input of the models."""
    return map(_case, shapes.linears())


test_quantize_per_token = common.benchmark_test(cases)
