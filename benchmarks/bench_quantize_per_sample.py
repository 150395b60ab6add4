"""Quantization with each picture's own scale, beside its definition in eager torch and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import common, operands, shapes
from ldmq_kernels import ops
from ldmq_kernels.kernels import reference

RIVALS = ("eager", "copy")


def _case(shape: shapes.Conv2d) -> common.Case:
    def make() -> common.Variants:
        x = operands.image(shape)
        return {
            "ldmq": lambda: ops.quantize_per_sample(x, None),
            "eager": lambda: reference.quantize_per_sample(x, None),
            "copy": x.clone,
        }

    elements = shape.n * shape.c * shape.size**2
    sizes = operands.Sizes(elements, elements, reads=2)
    return operands.producer_case(
        "quantize_per_sample",
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


test_quantize_per_sample = common.benchmark_test(cases)
