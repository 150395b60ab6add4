"""SiLU and quantization in one op, beside eager torch's two and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import operands, shapes
from benchmarks.harness.cases import Case, producer_summary
from benchmarks.harness.timing import Variants
from ldmq_kernels.kernels.reference import backend as reference
from ldmq_kernels.tuning.calls import PER_TOKEN

SHAPE = shapes.TOKENS
summary = producer_summary


def _unfused(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.quantize_per_token(torch.nn.functional.silu(x), None)


def case(shape: shapes.Linear) -> Case:
    """The input of one linear."""

    def make() -> Variants:
        ours = operands.operands_of("silu_quantize", operands.input_of(shape, PER_TOKEN))
        return {
            "ldmq": operands.call_of("silu_quantize", ours),
            "eager": lambda: _unfused(ours.x),
            "copy": ours.x.clone,
        }

    sizes = operands.Sizes(shape.m * shape.k, shape.m * shape.k)
    return operands.producer_case("silu_quantize", {"M": shape.m, "K": shape.k}, shape.count, make, sizes)


def cases() -> Iterator[Case]:
    """The time embedding of a batch of 2, which every residual block has, and a large one."""
    return map(case, (shapes.Linear(22, 2, 1280, 1280), shapes.Linear(0, 16384, 1280, 1280)))
