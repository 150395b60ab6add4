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
        inv_scale = torch.full((1,), 30.0, device=x.device)
        return {
            "ldmq": lambda: ops.quantize_static(x, inv_scale, 1),
            "eager": lambda: reference.quantize_static(x, inv_scale, 1),
            "copy": x.clone,
        }

    elements = shape.n * shape.c * shape.size**2
    sizes = operands.Sizes(elements, elements)
    return operands.producer_case(
        "quantize_static",
        operands.of_image(shape),
        shape.count,
        RIVALS,
        make,
        sizes,
    )


def cases() -> Iterator[common.Case]:
    """A case for each convolution's input of the models."""
    return map(_case, shapes.convolutions())


def summary(rows: list[dict]) -> dict[str, float | None]:
    """Share of a copy's bandwidth on large tensors, and the weighted ratio to eager torch."""
    return common.producer_summary(rows)


test_quantize_static = common.benchmark_test(cases)
