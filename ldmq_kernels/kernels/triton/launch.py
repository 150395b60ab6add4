"""What the launch of every Triton kernel needs on the host: a supported dtype, an output, the right device."""

from __future__ import annotations

import contextlib

import torch
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.dispatch import Unsupported

TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
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
    if x.dtype == torch.int8:
        return tl.int8
    return tl.float32 if x.device.type == "cpu" else TRITON_DTYPES[x.dtype]


def stored_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel stores an output in: the interpreter truncates to bfloat16, so torch rounds there."""
    return torch.float32 if x.device.type == "cpu" and dtype == torch.bfloat16 else dtype


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make x's GPU the current one, so that its current stream takes the launch."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.device)
