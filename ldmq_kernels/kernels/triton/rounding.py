"""Device functions of quantization: rounding half to even, and the scale of a dynamic one.

Kernels that use them are launched without fp fusion: an FMA would skip a rounding that the definition has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ldmq_kernels.kernels.reference.quantize_per_token import ABSMAX_FLOOR
from ldmq_kernels.numerics.formats.float8 import FLOAT8_MAX

FLOAT8_LARGEST = tl.constexpr(FLOAT8_MAX)
INT8_MAX = tl.constexpr(127.0)
FLOOR = tl.constexpr(ABSMAX_FLOOR)
# 1.5 * 2^23: float32 has no fraction bits there, so adding it rounds half to even, and the sum's lowest
# byte is the integer in two's complement; libdevice's rint does not run in the interpreter
ROUNDER = tl.constexpr(12582912.0)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # the bits of a float32 without its sign


@triton.jit
def round_to_int8(y: tl.tensor) -> tl.tensor:
    """clamp(rint(y), -127, 127); the bounds are integers, so clamping first changes nothing."""
    clamped = tl.minimum(tl.maximum(y, -INT8_MAX), INT8_MAX)
    return (clamped + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def rounded_to(y: tl.tensor, OUT: tl.constexpr) -> tl.tensor:
    """Clamp and round to int8; else to FP8, NaN staying NaN, or in the interpreter clamp alone."""
    if tl.int8 == OUT:
        q = round_to_int8(y)
    else:
        q = tl.maximum(y, -FLOAT8_LARGEST, propagate_nan=tl.PropagateNan.ALL)
        q = tl.minimum(q, FLOAT8_LARGEST, propagate_nan=tl.PropagateNan.ALL).to(OUT)
    return q


@triton.jit
def magnitude_bits(y: tl.tensor) -> tl.tensor:
    """int32 that is ordered as the absolute values of float32 are, with NaN above all of them."""
    return y.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def absolute_maximum(y: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """Largest absolute value along an axis, and NaN where there is one: a float reduction would drop it."""
    return tl.max(magnitude_bits(y), axis).to(tl.float32, bitcast=True)


@triton.jit
def dynamic_scale(absmax: tl.tensor, OUT: tl.constexpr) -> tl.tensor:
    """max(absmax, floor) / 127 for int8, else / 448, by IEEE division."""
    return tl.div_rn(
        tl.maximum(absmax, FLOOR, propagate_nan=tl.PropagateNan.ALL), INT8_MAX if tl.int8 == OUT else FLOAT8_LARGEST
    )
