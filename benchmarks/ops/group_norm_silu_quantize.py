"""GroupNorm, SiLU and quantization in one op, beside eager torch's three and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import operands, shapes
from benchmarks.harness.baselines import compiled
from benchmarks.harness.cases import Case, producer_summary
from benchmarks.harness.timing import Variants
from ldmq_kernels.kernels.reference import backend as reference
from ldmq_kernels.tuning.calls import STATIC

SHAPE = shapes.IMAGE
GROUPS, EPS = 32, 1e-5
summary = producer_summary


def _unfused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, inv_scale: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.silu(torch.nn.functional.group_norm(x, GROUPS, weight, bias, EPS))
    return reference.quantize_static(y, inv_scale, 1)


def case(shape: shapes.Conv2d) -> Case:
    """The input of one convolution."""

    def make() -> Variants:
        ours = operands.operands_of("group_norm_silu_quantize", operands.input_of(shape, STATIC))
        unfused = (ours.x, ours.norm_weight, ours.norm_bias, ours.inv_scale)
        return {
            "ldmq": operands.call_of("group_norm_silu_quantize", ours),
            "eager": lambda: _unfused(*unfused),
            "compiled": lambda: compiled(_unfused)(*unfused),
            "copy": ours.x.clone,
        }

    elements = shape.n * shape.c * shape.size**2
    sizes = operands.Sizes(elements, elements, reads=2)
    described, baselines = operands.of_image(shape), operands.WITH_COMPILED
    return operands.producer_case("group_norm_silu_quantize", described, shape.count, make, sizes, baselines)


def cases() -> Iterator[Case]:
    """A case for the input of each 3x3 convolution of the models that follows a norm."""
    kept = (s for s in shapes.convolutions() if s.kernel == 3 and s.stride == s.upsample == 1 and s.c % GROUPS == 0)
    return map(case, kept)
