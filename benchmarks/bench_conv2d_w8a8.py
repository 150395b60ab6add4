"""int8 convolution, beside float."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import common, operands, shapes
from ldmq_kernels import ops


def _case(shape: shapes.Conv2d) -> common.Case:
    def make() -> common.Variants:
        x, weight = operands.image(shape), operands.conv2d_weight(shape)
        x_scale, scale = operands.scales(1), operands.scales(shape.k)
        x_q = ops.quantize_static(x, torch.full((1,), 30.0, device=x.device), 1)
        more = (None, None, None, *operands.geometry(shape), x.dtype)
        ours = {"ldmq": lambda: ops.conv2d_w8a8(x_q, x_scale, weight, scale, *more)}
        return ours | operands.float_convolutions(shape, x)

    return common.Case(
        "conv2d_w8a8", operands.described(shape), shape.count, operands.CONV_RIVALS, make, operands.conv2d_work(shape)
    )


def cases() -> Iterator[common.Case]:
    """A case for each convolution of the models."""
    return map(_case, shapes.convolutions())


def summary(rows: list[dict]) -> dict[str, float | None]:
    """The weighted ratio to cuDNN over 3x3 kernels, and the worst of those with 32 channels or more on both sides."""
    square = [row for row in rows if row["shape"]["kernel"] == 3]
    wide = [row for row in rows if min(row["shape"]["C"], row["shape"]["K"]) >= 32]
    ratios = [row["rivals"]["cudnn_fp16"]["ratio"] for row in wide if "cudnn_fp16" in row["rivals"]]
    return {
        "conv2d_w8a8/geomean_vs_cudnn_fp16": common.geometric_mean(square, "cudnn_fp16"),
        "conv2d_w8a8/worst_vs_cudnn_fp16": min(ratios, default=None),
        **common.cuda_over_triton("conv2d_w8a8", rows),
    }


test_conv2d_w8a8 = common.benchmark_test(cases)
