"""FP8 convolution, beside float: no library that it is measured beside has one."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import cases as harness
from benchmarks.harness import operands, shapes
from benchmarks.harness.timing import Variants

SHAPE = shapes.CONV2D


def case(shape: shapes.Conv2d) -> harness.Case:
    """One convolution."""

    def make() -> Variants:
        ours = operands.call_of("conv2d_fp8", operands.operands_of("conv2d_fp8", shape))
        return {"ldmq": ours} | operands.float_convolutions(shape, operands.image(shape))

    return operands.conv2d_case("conv2d_fp8", shape, make, bits=(8, 8))


def cases() -> Iterator[harness.Case]:
    """A case for each convolution of the models."""
    return map(case, shapes.convolutions())


def summary(rows: list[dict]) -> dict[str, float | None]:
    """The weighted ratio to cuDNN over 3x3 kernels."""
    square = [row for row in rows if row["shape"]["kernel"] == 3]
    return {
        "conv2d_fp8/geomean_vs_cudnn_fp16": harness.geometric_mean(square, "fp16"),
        **harness.cuda_over_triton("conv2d_fp8", rows),
    }
