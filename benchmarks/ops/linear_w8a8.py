"""int8 linear, with and without quantizing its input, beside float, `torch._int_mm`, FP8, torchao and SDNQ."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.harness import cases as harness
from benchmarks.harness import operands, shapes
from benchmarks.harness.baselines import TOOLS, compiled, lazily
from benchmarks.harness.machine import device, dtype
from benchmarks.harness.timing import Call, Variants
from ldmq_kernels import ops

SHAPE = shapes.LINEAR
SQUARES = (4096, 8192)  # in which a GPU comes nearest to its peak


# by Inductor's defaults the epilogue is a kernel of its own after the product
def _int_mm(x_q: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    return (torch._int_mm(x_q, weight.t()) * x_scale * scale).to(out_dtype)


def _integer_gemms(shape: shapes.Linear) -> Variants:
    plain = operands.operands_of("linear_w8a8", shape, is_packed=False)
    x_q, weight, scale = plain.x_q, plain.weight, plain.weight_scale

    def int_mm() -> Call:
        x_scale, out_dtype = torch.ones(x_q.shape[0], 1, device=x_q.device), dtype()
        return lambda: compiled(_int_mm)(x_q, weight, x_scale, scale, out_dtype)

    def fp8() -> Call:
        x8, w8 = x_q.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn).t()
        x_scale, row = torch.ones(x_q.shape[0], 1, device=x_q.device), scale.view(1, -1)
        return lambda: torch._scaled_mm(x8, w8, x_scale, row, out_dtype=torch.bfloat16, use_fast_accum=True)

    return {"int_mm": lazily(int_mm), "fp8": lazily(fp8)}


def _tools(shape: shapes.Linear, x: Tensor) -> Variants:
    """The same layer by torchao and SDNQ, its input's quantization included."""

    def build(tool: str) -> Call:
        layer = TOOLS[tool](nn.Sequential(nn.Linear(shape.k, shape.n, device=x.device, dtype=x.dtype)))
        return lambda: layer(x)

    return {tool: lazily(lambda tool=tool: build(tool)) for tool in TOOLS}


def case(shape: shapes.Linear) -> harness.Case:
    """One linear."""

    def make() -> Variants:
        ours, x = operands.operands_of("linear_w8a8", shape), operands.normal(shape.m, shape.k)

        def with_quantize() -> Tensor:
            q, q_scale = ops.quantize_per_token(x, None)
            return ops.linear_w8a8(q, q_scale, ours.weight, ours.weight_scale, ours.bias, None, x.dtype)

        variants = {"ldmq": operands.call_of("linear_w8a8", ours), "ldmq_with_quantize": with_quantize}
        return variants | operands.float_linears(shape, x) | _integer_gemms(shape) | _tools(shape, x)

    return operands.linear_case(
        "linear_w8a8", shape, make, bits=(8, 8), others=("ldmq_with_quantize", "int_mm", "fp8", *TOOLS)
    )


def cases() -> Iterator[harness.Case]:
    """A case for each linear of the models, and two large squares on a GPU."""
    squares = [shapes.Linear(0, size, size, size) for size in SQUARES] if device().type == "cuda" else []
    return map(case, (*shapes.linears(), *squares))


def summary(rows: list[dict]) -> dict[str, float | None]:
    """Weighted ratios to each baseline."""
    fp16, own = harness.geometric_mean(rows, "fp16"), harness.geometric_mean(rows, "ldmq_with_quantize")
    squares = [row for row in rows if set(row["shape"].values()) in ({size} for size in SQUARES)]
    return {
        "linear_w8a8/geomean_vs_fp16": fp16,
        "linear_w8a8/geomean_vs_fp16_with_quantize": fp16 / own if fp16 and own else None,
        "linear_w8a8/geomean_vs_int_mm": harness.geometric_mean(rows, "int_mm"),
        "linear_w8a8/geomean_vs_fp8": harness.geometric_mean(rows, "fp8"),
        **{f"linear_w8a8/tops_{row['shape']['M']}": row["tops"] for row in squares},
        **harness.cuda_over_triton("linear_w8a8", rows),
    }
