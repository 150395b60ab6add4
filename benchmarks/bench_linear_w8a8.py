"""int8 linear, with and without quantizing its input, beside float, `torch._int_mm` and FP8."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import common, operands, rival_models, shapes
from ldmq_kernels import ops

INTEGER_RIVALS = ("int_mm", "scaled_mm_fp8", *rival_models.TOOLS) if torch.cuda.is_available() else ()


# by Inductor's defaults the epilogue is a kernel of its own after the product
def _int_mm(x_q: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (torch._int_mm(x_q, weight.t()) * x_scale * scale).to(operands.DTYPE)


def _integer_rivals(x_q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> common.Variants:
    if not x_q.is_cuda:
        return {}
    x_scale = torch.ones(x_q.shape[0], 1, device=x_q.device)
    x8, w8 = x_q.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn).t()
    row = scale.view(1, -1)
    return {
        "int_mm": lambda: common.compiled(_int_mm)(x_q, weight, x_scale, scale),
        "scaled_mm_fp8": lambda: torch._scaled_mm(x8, w8, x_scale, row, out_dtype=torch.bfloat16, use_fast_accum=True),
    }


def _tool_rivals(shape: shapes.Linear, x: torch.Tensor) -> common.Variants:
    """The same layer by torchao and SDNQ, where they are installed."""
    if not x.is_cuda:
        return {}

    def layer() -> torch.nn.Linear:
        return torch.nn.Linear(shape.k, shape.n, device=x.device, dtype=x.dtype)

    made: dict[str, torch.nn.Module] = {}

    def call(name: str) -> torch.Tensor:
        if name not in made:
            made[name] = rival_models.TOOLS[name](torch.nn.Sequential(layer()))
        return made[name](x)

    return {name: partial(call, name) for name in rival_models.TOOLS}


def _case(shape: shapes.Linear) -> common.Case:
    def make() -> common.Variants:
        x, x_q = operands.normal(shape.m, shape.k), operands.integers(shape.m, shape.k)
        weight, scale, x_scale = operands.linear_weight(shape.n, shape.k), operands.scales(shape.n), operands.scales(1)

        def quantized() -> torch.Tensor:
            return ops.linear_w8a8(x_q, x_scale, weight, scale, None, None, x.dtype)

        def with_quantize() -> torch.Tensor:
            q, q_scale = ops.quantize_per_token(x, None)
            return ops.linear_w8a8(q, q_scale, weight, scale, None, None, x.dtype)

        ours = {"ldmq": quantized, "ldmq_with_quantize": with_quantize}
        rivals = operands.float_linears(shape, x) | _integer_rivals(x_q, weight, scale)
        return ours | rivals | _tool_rivals(shape, x)

    described = {"M": shape.m, "K": shape.k, "N": shape.n}
    rivals = ("ldmq_with_quantize", *operands.FLOAT_RIVALS, *INTEGER_RIVALS)
    return common.Case("linear_w8a8", described, shape.count, rivals, make, operands.linear_work(shape))


def cases() -> Iterator[common.Case]:
    """A case for each linear of the models, and two large squares on a GPU."""
    squares = [shapes.Linear(0, size, size, size) for size in (4096, 8192)] if torch.cuda.is_available() else []
    return map(_case, (*shapes.linears(), *squares))


def summary(rows: list[dict]) -> dict[str, float | None]:
    """Weighted ratios to each rival."""
    fp16, own = common.geometric_mean(rows, "cublas_fp16"), common.geometric_mean(rows, "ldmq_with_quantize")
    return {
        "linear_w8a8/geomean_vs_fp16": fp16,
        "linear_w8a8/geomean_vs_fp16_with_quantize": fp16 / own if fp16 and own else None,
        "linear_w8a8/geomean_vs_int_mm": common.geometric_mean(rows, "int_mm"),
        "linear_w8a8/geomean_vs_fp8": common.geometric_mean(rows, "scaled_mm_fp8"),
        **{f"linear_w8a8/tops_{row['shape']['M']}": row["tops"] for row in rows if row["count"] == 0},
        **common.cuda_over_triton("linear_w8a8", rows),
    }


test_linear_w8a8 = common.benchmark_test(cases)
