"""SiLU and quantization in one op, beside eager torch's two and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import common, operands, shapes
from ldmq_kernels import ops
from ldmq_kernels.kernels import reference

RIVALS = ("eager", "copy")


def _unfused(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.quantize_per_token(torch.nn.functional.silu(x), None)


def _case(shape: shapes.Linear) -> common.Case:
    def make() -> common.Variants:
        x = operands.normal(shape.m, shape.k)
        return {
            "ldmq": lambda: ops.silu_quantize(x, None, None),
            "eager": lambda: _unfused(x),
            "copy": x.clone,
        }

    sizes = operands.Sizes(shape.m * shape.k, shape.m * shape.k)
    return operands.producer_case("silu_quantize", {"M": shape.m, "K": shape.k}, shape.count, RIVALS, make, sizes)


def cases() -> Iterator[common.Case]:
    """The time embedding of a batch of 2, which every residual block has, and a large one."""
    return map(_case, (shapes.Linear(22, 2, 1280, 1280), shapes.Linear(0, 16384, 1280, 1280)))


def summary(rows: list[dict]) -> dict[str, float | None]:
    """Share of a copy's bandwidth on large tensors, and the weighted ratio to eager torch."""
    return common.producer_summary(rows)


test_silu_quantize = common.benchmark_test(cases)
