"""Quantization with a calibrated scale, beside its definition in eager torch and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import operands, shapes
from benchmarks.harness.cases import Case, producer_summary
from benchmarks.harness.timing import Variants
from ldmq_kernels.kernels.reference import backend as reference
from ldmq_kernels.tuning.calls import STATIC

SHAPE = shapes.IMAGE
summary = producer_summary


def case(shape: shapes.Conv2d) -> Case:
    """The input of one convolution."""

    def make() -> Variants:
        ours = operands.operands_of("quantize_static", operands.input_of(shape, STATIC))
        return {
            "ldmq": operands.call_of("quantize_static", ours),
            "eager": lambda: reference.quantize_static(ours.x, ours.inv_scale, 1),
            "copy": ours.x.clone,
        }

    elements = shape.n * shape.c * shape.size**2
    sizes = operands.Sizes(elements, elements)
    return operands.producer_case("quantize_static", operands.of_image(shape), shape.count, make, sizes)


def cases() -> Iterator[Case]:
    """A case for each convolution's input of the models."""
    return map(case, shapes.convolutions())
