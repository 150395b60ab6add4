"""GELU by tanh and quantization in one op, beside eager torch's two and a copy of the same input."""

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
    return reference.quantize_per_token(torch.nn.functional.gelu(x, approximate="tanh"), None)


def case(shape: shapes.Linear) -> Case:
    """The input of one linear."""

    def make() -> Variants:
        ours = operands.operands_of("gelu_quantize", operands.input_of(shape, PER_TOKEN))
        return {
            "ldmq": operands.call_of("gelu_quantize", ours),
            "eager": lambda: _unfused(ours.x),
            "copy": ours.x.clone,
        }

    sizes = operands.Sizes(shape.m * shape.k, shape.m * shape.k)
    return operands.producer_case("gelu_quantize", {"M": shape.m, "K": shape.k}, shape.count, make, sizes)


def cases() -> Iterator[Case]:
    """The feed-forward of Flux (4096 tokens of the picture and 512 of the text) and of Wan 1.3B at 480p."""
    return map(case, (shapes.Linear(57, 4608, 12288, 3072), shapes.Linear(30, 32760, 8960, 1536)))
