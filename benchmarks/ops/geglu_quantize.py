"""GEGLU's gate and quantization in one op, beside eager torch's and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import operands, shapes
from benchmarks.harness.baselines import compiled
from benchmarks.harness.cases import Case, producer_summary
from benchmarks.harness.timing import Variants
from ldmq_kernels.kernels.reference import backend as reference
from ldmq_kernels.tuning.calls import PER_TOKEN
from ldmq_kernels.tuning.shapes import Input

SHAPE = shapes.TOKENS
summary = producer_summary


def _unfused(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value, gate = x.chunk(2, dim=-1)
    return reference.quantize_per_token(value * torch.nn.functional.gelu(gate), None)


def case(shape: shapes.Linear) -> Case:
    """The input of one gate: value and gate side by side."""

    def make() -> Variants:
        ours = operands.operands_of("geglu_quantize", Input((shape.m, shape.n), PER_TOKEN))
        return {
            "ldmq": operands.call_of("geglu_quantize", ours),
            "eager": lambda: _unfused(ours.x),
            "compiled": lambda: compiled(_unfused)(ours.x),
            "copy": ours.x.clone,
        }

    sizes = operands.Sizes(shape.m * shape.n, shape.m * shape.n // 2)
    described = {"M": shape.m, "C2": shape.n}
    return operands.producer_case("geglu_quantize", described, shape.count, make, sizes, operands.WITH_COMPILED)


def cases() -> Iterator[Case]:
    """A case for each feed-forward layer of the models: those that widen eight times."""
    return map(case, shapes.geglus())
