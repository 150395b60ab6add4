"""FP8 linear, with and without quantizing its input, beside float, `torch._scaled_mm` and torchao's float8."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.harness import cases as harness
from benchmarks.harness import operands, shapes
from benchmarks.harness.baselines import by_torchao_fp8, lazily
from benchmarks.harness.timing import Call, Variants
from ldmq_kernels import ops
from ldmq_kernels.numerics.formats.float8 import FLOAT8

SHAPE = shapes.LINEAR


def _rivals(shape: shapes.Linear, x: Tensor) -> Variants:
    """The product alone by cuBLAS; torchao's layer, its input's quantization included."""
    plain = operands.operands_of("linear_fp8", shape, is_packed=False)

    def scaled_mm() -> Call:
        x_scale, row = torch.ones(shape.m, 1, device=x.device), plain.weight_scale.view(1, -1)
        weight = plain.weight.t()
        return lambda: torch._scaled_mm(plain.x_q, weight, x_scale, row, out_dtype=torch.bfloat16, use_fast_accum=True)

    def torchao() -> Call:
        layer = by_torchao_fp8(nn.Sequential(nn.Linear(shape.k, shape.n, device=x.device, dtype=x.dtype)))
        return lambda: layer(x)

    return {"fp8": lazily(scaled_mm), "torchao_fp8": lazily(torchao)}


def case(shape: shapes.Linear) -> harness.Case:
    """One linear."""

    def make() -> Variants:
        ours, x = operands.operands_of("linear_fp8", shape), operands.normal(shape.m, shape.k)

        def with_quantize() -> Tensor:
            q, q_scale = ops.quantize_per_token(x, None, FLOAT8)
            return ops.linear_fp8(q, q_scale, ours.weight, ours.weight_scale, ours.bias, None, x.dtype)

        variants = {"ldmq": operands.call_of("linear_fp8", ours), "ldmq_with_quantize": with_quantize}
        return variants | operands.float_linears(shape, x) | _rivals(shape, x)

    others = ("ldmq_with_quantize", "fp8", "torchao_fp8")
    return operands.linear_case("linear_fp8", shape, make, bits=(8, 8), others=others)


def cases() -> Iterator[harness.Case]:
    """A case for each linear of the models."""
    return map(case, shapes.linears())


def summary(rows: list[dict]) -> dict[str, float | None]:
    """Weighted ratios to each baseline."""
    return {
        "linear_fp8/geomean_vs_fp16": harness.geometric_mean(rows, "fp16"),
        "linear_fp8/geomean_vs_fp8": harness.geometric_mean(rows, "fp8"),
        "linear_fp8/geomean_vs_torchao_fp8": harness.geometric_mean(rows, "torchao_fp8"),
        **harness.cuda_over_triton("linear_fp8", rows),
    }
