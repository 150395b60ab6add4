"""Elementwise work on rows, by `rows.c` or a block at a time, so that float32 intermediates stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled
from ldmq_kernels.kernels.cpu.compiled import Epilogue
from ldmq_kernels.kernels.reference.quantize_static import refuse_nan
from ldmq_kernels.numerics.formats.float8 import FLOAT8, FLOAT8_MAX

BLOCK_PER_THREAD = 1 << 17  # float32 elements; half a megabyte, a quarter of a server core's L2


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover `rows` rows of `columns` elements."""
    step = max(1, BLOCK_PER_THREAD * torch.get_num_threads() // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def quantize_rows(x: Tensor, factors: tuple[Tensor, ...], out: Tensor, *, is_static: bool = False) -> None:
    """out = clamp(rint(fp32(x) * factors[0] * factors[1] ...), -127, 127), multiplied in this order; of FP8 as e4m3.

    Args:
        x: (M, C) floating, contiguous.
        factors: float32 (1,) or (C,) each.
        out: (M, C) int8 or FP8, contiguous.
        is_static: whether the scale is calibrated, and so does not show NaN, which int8 lacks.

    Raises:
        ValueError: there is NaN where the scale is calibrated.
    """
    for block in row_blocks(*x.shape):
        y = x[block].float() * factors[0] if x.dtype == torch.float32 else x[block].float().mul_(factors[0])
        for factor in factors[1:]:
            y.mul_(factor)
        if out.dtype == FLOAT8:
            out[block].copy_(y.clamp_(-FLOAT8_MAX, FLOAT8_MAX))
            continue
        y.round_().clamp_(-127, 127)
        if is_static:
            refuse_nan(y)
        out[block].copy_(y)


def finish_rows(accumulator: Tensor, epilogue: Epilogue, out: Tensor) -> None:
    """Write an epilogue; overwrites the accumulator.

    Args:
        accumulator: (M, N) float32, contiguous.
        epilogue: of its sums.
        out: (M, N) of the output's dtype, contiguous; the accumulator itself where that is float32.

    Raises:
        Unsupported: an operand does not fit.
    """
    epilogue = epilogue.fitted(*accumulator.shape)
    if compiled.takes(epilogue.residual, out):
        compiled.finish(accumulator, epilogue, out)
        return
    scale, column_scale, bias, sample_bias, residual, gate = epilogue.as_rows(*accumulator.shape)
    for block in row_blocks(*accumulator.shape):
        y = accumulator[block]
        y.mul_(_of_rows(scale, block, len(out)))
        if column_scale is not None:
            y.mul_(column_scale)
        if bias is not None:
            y.add_(bias)
        if sample_bias is not None:
            y.add_(_of_rows(sample_bias, block, len(out)))
        if gate is not None:
            y.mul_(_of_rows(gate, block, len(out)))
        if residual is not None:
            y.add_(residual[block])
        if out.data_ptr() != accumulator.data_ptr():
            out[block].copy_(y)


def _of_rows(runs: Tensor, block: slice, rows: int) -> Tensor:
    """The rows of (G, ...) that a block of `rows` rows has, each of G for an equal run of them."""
    if len(runs) == 1:
        return runs
    if len(runs) == rows:
        return runs[block]
    return runs[torch.arange(block.start, min(block.stop, rows), device=runs.device) * len(runs) // rows]


def as_rows(x: Tensor) -> Tensor:
    """(N, C, H, W), channels_last in memory, as (N * H * W, C) of the same memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
