"""Rotation and quantization with each token's own scale, beside its definition in torch and a copy of the input."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import operands, shapes
from benchmarks.harness.cases import Case, producer_summary
from benchmarks.harness.timing import Variants
from ldmq_kernels.kernels.reference import backend as reference
from ldmq_kernels.tuning.calls import PER_TOKEN

SHAPE = shapes.TOKENS
summary = producer_summary


def case(shape: shapes.Linear) -> Case:
    """The input of one linear."""

    def make() -> Variants:
        ours = operands.operands_of("rotate_quantize_per_token", operands.input_of(shape, PER_TOKEN))
        return {
            "ldmq": operands.call_of("rotate_quantize_per_token", ours),
            "eager": lambda: reference.rotate_quantize_per_token(ours.x, None),
            "copy": ours.x.clone,
        }

    sizes = operands.Sizes(shape.m * shape.k, shape.m * shape.k)
    return operands.producer_case("rotate_quantize_per_token", {"M": shape.m, "K": shape.k}, shape.count, make, sizes)


def cases() -> Iterator[Case]:
    """A case for each linear's input of the models."""
    return map(case, shapes.linears())
