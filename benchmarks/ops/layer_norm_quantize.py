"""LayerNorm and quantization in one op, beside eager torch's two and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import operands, shapes
from benchmarks.harness.baselines import compiled
from benchmarks.harness.cases import Case, one_of_each, producer_summary
from benchmarks.harness.timing import Variants
from ldmq_kernels.kernels.reference import backend as reference
from ldmq_kernels.tuning.calls import PER_TOKEN

SHAPE = shapes.TOKENS
EPS = 1e-5
WIDEST = 1280  # transformer block of the models
summary = producer_summary


def _unfused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.quantize_per_token(torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, EPS), None)


def case(shape: shapes.Linear) -> Case:
    """The input of one linear."""

    def make() -> Variants:
        ours = operands.operands_of("layer_norm_quantize", operands.input_of(shape, PER_TOKEN))
        unfused = (ours.x, ours.norm_weight, ours.norm_bias)
        return {
            "ldmq": operands.call_of("layer_norm_quantize", ours),
            "eager": lambda: _unfused(*unfused),
            "compiled": lambda: compiled(_unfused)(*unfused),
            "copy": ours.x.clone,
        }

    sizes = operands.Sizes(shape.m * shape.k, shape.m * shape.k)
    described, baselines = {"M": shape.m, "K": shape.k}, operands.WITH_COMPILED
    return operands.producer_case("layer_norm_quantize", described, shape.count, make, sizes, baselines)


def cases() -> Iterator[Case]:
    """A case for each width of a transformer block in the models."""
    return map(case, one_of_each(shapes.linears(), lambda s: (s.m, s.k) if s.k <= WIDEST else None))
