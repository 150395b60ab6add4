"""Quantization with each token's own scale, beside its definition in eager torch and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

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

    sizes = operands.Sizes(shape.m * shape.k, shape.m * shape.k)
    return operands.producer_case("quantize_per_token", {"M": shape.m, "K": shape.k}, shape.count, RIVALS, make, sizes)


def cases() -> Iterator[common.Case]:
    """A case for each linear's input of the models."""
    return map(_case, shapes.linears())


def summary(rows: list[dict]) -> dict[str, float | None]:
    """Share of a copy's bandwidth on large tensors, and the weighted ratio to eager torch."""
    return common.producer_summary(rows)


test_quantize_per_token = common.benchmark_test(cases)
