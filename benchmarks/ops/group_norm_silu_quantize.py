"""GroupNorm, SiLU and quantization in one op, beside eager torch's three and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import operands, shapes
from benchmarks.harness.baselines import compiled
from benchmarks.harness.cases import Case, producer_summary
from benchmarks.harness.timing import Variants
from ldmq_kernels import ops
from ldmq_kernels.kernels.reference import backend as reference

SHAPE = shapes.IMAGE
GROUPS, EPS = 32, 1e-5
summary = producer_summary


def _unfused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, inv_scale: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.silu(torch.nn.functional.group_norm(x, GROUPS, weight, bias, EPS))
    return reference.quantize_static(y, inv_scale, 1)


def case(shape: shapes.Conv2d) -> Case:
    """The input of one convolution."""

    def make() -> Variants:
        x = operands.image(shape)
        weight, bias = operands.normal(shape.c), operands.normal(shape.c)
        inv_scale = torch.full((1,), 30.0, device=x.device)
        arguments = (x, weight, bias, GROUPS, EPS, True, inv_scale, None, False)
        return {
            "ldmq": lambda: ops.group_norm_silu_quantize(*arguments),
            "eager": lambda: _unfused(x, weight, bias, inv_scale),
            "compiled": lambda: compiled(_unfused)(x, weight, bias, inv_scale),
            "copy": x.clone,
        }

    elements = shape.n * shape.c * shape.size**2
    sizes = operands.Sizes(elements, elements, reads=2)
    described, baselines = operands.of_image(shape), operands.WITH_COMPILED
    return operands.producer_case("group_norm_silu_quantize", described, shape.count, make, sizes, baselines)


def cases() -> Iterator[Case]:
    """A case for the input of each 3x3 convolution of the models that follows a norm."""
    kept = (s for s in shapes.convolutions() if s.kernel == 3 and s.stride == s.upsample == 1 and s.c % GROUPS == 0)
    return map(case, kept)
