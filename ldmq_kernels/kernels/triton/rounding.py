"""Device functions of quantization: rounding half to even, and the scale of a dynamic one.

Kernels that use them are launched without fp fusion: an FMA would skip a rounding that the definition has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ldmq_kernels.kernels.reference.quantize_per_token import ABSMAX_FLOOR

INT8_MAX = tl.constexpr(127.0)
FLOOR = tl.constexpr(ABSMAX_FLOOR)
# 1.5 * 2^23: float32 has no fraction bits there, so adding it rounds half to even; libdevice's
# rint does not run in the interpreter
ROUNDER = tl.constexpr(12582912.0)
ELEMENTS = 2048  # of one program's block


def block_shape(channels: int) -> tuple[int, int]:
    """Rows and columns of a block over a matrix of this many columns."""
    columns = min(triton.next_power_of_2(channels), ELEMENTS)
    return ELEMENTS // columns, columns


@triton.jit
def round_to_int8(y: tl.tensor) -> tl.tensor:
    """clamp(rint(y), -127, 127); the bounds are integers, so clamping first changes nothing."""
    clamped = tl.minimum(tl.maximum(y, -INT8_MAX), INT8_MAX)
    return ((clamped + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def absolute_maximum(y: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """Largest absolute value along an axis, and NaN where there is one: a reduction alone would drop it."""
    has_nan = tl.max((y != y).to(tl.int32), axis) != 0
    return tl.where(has_nan, float("nan"), tl.max(tl.abs(y), axis))


@triton.jit
def running_maximum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The larger one, and NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def dynamic_scale(absmax: tl.tensor) -> tl.tensor:
    """max(absmax, floor) / 127, by IEEE division."""
    return tl.div_rn(running_maximum(absmax, FLOOR), INT8_MAX)
