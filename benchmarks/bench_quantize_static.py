"""Quantization with a calibrated scale, beside its definition in eager torch and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import common, operands, shapes
from ldmq_kernels import ops
from ldmq_kernels.kernels import reference

RIVALS = ("eager", "copy")


def _case(shape: shapes.Conv2d) -> common.Case:
    def make() -> common.Variants:
        x = operands.image(shape)
        reciprocal = torch.full((1,), 30.0, device=x.device)
        return {
            "ldmq": lambda: ops.quantize_static(x, reciprocal, 1),
            "eager": lambda: reference.quantize_static(x, reciprocal, 1),
            "copy": x.clone,
        }

    described = {"N": shape.n, "C": shape.c, "H": shape.size, "W": shape.size}
    elements = shape.n * shape.c * shape.size**2
    moved = elements * (torch.finfo(operands.DTYPE).bits // 8 + 1)
    return common.Case("quantize_static", described, shape.count, RIVALS, make, moved=moved)


def cases() -> Iterator[common.Case]:
    """A case for each convolution's input of the models."""
    return map(_case, shapes.convolutions())


test_quantize_static = common.benchmark_test(cases)
