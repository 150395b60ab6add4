"""What the launch of every Triton kernel needs on the host: a supported dtype, an output, the right device."""

from __future__ import annotations

import contextlib

import torch
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.operands import check_float8, eight_bit
from ldmq_kernels.numerics.formats.float8 import FLOAT8

TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
EIGHT_BIT = {torch.int8: tl.int8, FLOAT8: tl.float8e4nv}
EIGHT_BIT_SUMS = {torch.int8: tl.int32, FLOAT8: tl.float32}
_NO_GUARD = contextlib.nullcontext()


def floating(x: Tensor) -> Tensor:
    """The activations, once their dtype is one that the kernels read.

    Raises:
        Unsupported: the dtype is not float16, bfloat16 or float32.
    """
    if x.dtype not in TRITON_DTYPES:
        raise Unsupported(f"activations are {x.dtype}; Triton takes float16, bfloat16 and float32")
    return x


def dot_dtype(x: Tensor) -> tl.dtype:
    """The dtype that tl.dot multiplies x in: x's own, but float32 in the interpreter, which lacks bfloat16."""
    if x.dtype in EIGHT_BIT:
        return EIGHT_BIT[x.dtype]
    return tl.float32 if x.device.type == "cpu" else TRITON_DTYPES[x.dtype]


def accumulator_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of sums of products of 8-bit activations by a weight."""
    return torch.float32 if weight.dtype == FLOAT8 else torch.int32


def stored_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel stores an output in: where the interpreter truncates, torch rounds: to bfloat16, FP8."""
    return torch.float32 if x.device.type == "cpu" and dtype in (torch.bfloat16, FLOAT8) else dtype


def quantized_dtype(x: Tensor, q_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a kernel stores quantized values of x in, int8 where none is asked for.

    Raises:
        Unsupported: FP8 on a GPU that has none, or neither int8 nor FP8.
    """
    if q_dtype == FLOAT8:
        check_float8(x.device)
    return stored_dtype(x, eight_bit(q_dtype))


def as_asked(q: Tensor, q_dtype: torch.dtype | None) -> Tensor:
    """Quantized values in the dtype that was asked for, where a kernel stored them in another."""
    return q if q_dtype is None else q.to(q_dtype)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make x's GPU the current one, so that its current stream takes the launch."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.device)
