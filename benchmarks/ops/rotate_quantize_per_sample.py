"""Rotation and quantization with each picture's own scale, beside its definition in torch and a copy of the input."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import operands, shapes
from benchmarks.harness.cases import Case, producer_summary
from benchmarks.harness.timing import Variants
from ldmq_kernels.kernels.reference import backend as reference
from ldmq_kernels.tuning.calls import PER_SAMPLE

SHAPE = shapes.IMAGE
summary = producer_summary


def case(shape: shapes.Conv2d) -> Case:
    """The input of one convolution."""

    def make() -> Variants:
        ours = operands.operands_of("rotate_quantize_per_sample", operands.input_of(shape, PER_SAMPLE))
        return {
            "ldmq": operands.call_of("rotate_quantize_per_sample", ours),
            "eager": lambda: reference.rotate_quantize_per_sample(ours.x, None),
            "copy": ours.x.clone,
        }

    elements = shape.n * shape.c * shape.size**2
    sizes = operands.Sizes(elements, elements, reads=2)
    return operands.producer_case("rotate_quantize_per_sample", operands.of_image(shape), shape.count, make, sizes)


def cases() -> Iterator[Case]:
    """A case for each convolution's input of the models."""
    return map(case, shapes.convolutions())
