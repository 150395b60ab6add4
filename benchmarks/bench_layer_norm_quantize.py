"""LayerNorm and quantization in one op, beside eager torch's two and a copy of the same input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import common, operands, shapes
from ldmq_kernels import ops
from ldmq_kernels.kernels import reference

RIVALS = ("eager", "compiled", "copy") if torch.cuda.is_available() else ("eager", "copy")
EPS = 1e-5


def _unfused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.quantize_per_token(torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, EPS), None)


def _case(shape: shapes.Linear) -> common.Case:
    def make() -> common.Variants:
        x, weight, bias = operands.normal(shape.m, shape.k), operands.normal(shape.k), operands.normal(shape.k)
        return {
            "ldmq": lambda: ops.layer_norm_quantize(x, weight, bias, EPS, None, None),
            "eager": lambda: _unfused(x, weight, bias),
            **({"compiled": lambda: common.compiled(_unfused)(x, weight, bias)} if x.is_cuda else {}),
            "copy": x.clone,
        }

    sizes = operands.Sizes(shape.m * shape.k, shape.m * shape.k)
    return operands.producer_case("layer_norm_quantize", {"M": shape.m, "K": shape.k}, shape.count, RIVALS, make, sizes)


def cases() -> Iterator[common.Case]:
    """A case for each width of a transformer block in the models."""
    return map(_case, common.one_of_each(shapes.linears(), lambda s: (s.m, s.k) if s.k <= 1280 else None))


def summary(rows: list[dict]) -> dict[str, float | None]:
    """Share of a copy's bandwidth on large tensors, and the weighted ratio to eager torch."""
    return common.producer_summary(rows)


test_layer_norm_quantize = common.benchmark_test(cases)
