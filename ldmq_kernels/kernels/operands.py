"""Checks that the operands of a GEMM pass before a GPU backend launches its kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmq_kernels.kernels.dispatch import Unsupported


def plain(weight: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The weight, contiguous, once its layout, dtype and shape are what a GPU kernel reads.

    Raises:
        Unsupported: the weight is packed for another backend, or has another dtype or shape.
    """
    if weight.layout != torch.strided:
        raise Unsupported(f"the weight is packed ({weight.layout}); the GPU kernels take plain {dtype}")
    if weight.dtype != dtype or tuple(weight.shape) != tuple(shape):
        raise Unsupported(
            f"the weight is {weight.dtype} {tuple(weight.shape)}; this layer takes {dtype} {tuple(shape)}"
        )
    return weight.contiguous()


def int8(x_q: Tensor) -> Tensor:
    """The quantized activations, once their dtype is int8.

    Raises:
        Unsupported: the dtype is another one.
    """
    if x_q.dtype != torch.int8:
        raise Unsupported(f"quantized activations are {x_q.dtype}; the GPU kernels take int8")
    return x_q
