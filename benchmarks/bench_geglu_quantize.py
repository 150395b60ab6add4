"""GEGLU's gate and quantization in one op, beside eager torch's and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import common, operands, shapes
from ldmq_kernels import ops
from ldmq_kernels.kernels import reference

RIVALS = ("eager", "compiled", "copy") if torch.cuda.is_available() else ("eager", "copy")


def _unfused(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value, gate = x.chunk(2, dim=-1)
    return reference.quantize_per_token(value * torch.nn.functional.gelu(gate), None)


def _case(shape: shapes.Linear) -> common.Case:
    def make() -> common.Variants:
        x = operands.normal(shape.m, shape.n)
        return {
            "ldmq": lambda: ops.geglu_quantize(x, None, None),
            "eager": lambda: _unfused(x),
            **({"compiled": lambda: common.compiled(_unfused)(x)} if x.is_cuda else {}),
            "copy": x.clone,
        }

    sizes = operands.Sizes(shape.m * shape.n, shape.m * shape.n // 2)
    return operands.producer_case("geglu_quantize", {"M": shape.m, "C2": shape.n}, shape.count, RIVALS, make, sizes)


def cases() -> Iterator[common.Case]:
    """A case for each feed-forward layer of the models: those that widen eight times."""
    return map(_case, (shape for shape in shapes.linears() if shape.n == 8 * shape.k))


def summary(rows: list[dict]) -> dict[str, float | None]:
    """Share of a copy's bandwidth on large tensors, and the weighted ratio to eager torch."""
    return common.producer_summary(rows)


test_geglu_quantize = common.benchmark_test(cases)
