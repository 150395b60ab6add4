"""Checks that the operands of a GEMM pass before a GPU backend launches its kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.gpu import FLOAT8_FROM, gpu_of
from ldmq_kernels.kernels.measurements import warn_once
from ldmq_kernels.numerics.formats.float8 import FLOAT8


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


def quantized(x_q: Tensor, dtype: torch.dtype) -> Tensor:
    """The quantized activations, once their dtype is this one.

    Raises:
        Unsupported: the dtype is another one.
    """
    if x_q.dtype != dtype:
        raise Unsupported(f"quantized activations are {x_q.dtype}; this kernel takes {dtype}")
    return x_q


def eight_bit(q_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that an op that quantizes is asked for, int8 where none is given.

    Raises:
        Unsupported: neither int8 nor float8_e4m3fn.
    """
    if q_dtype not in (None, torch.int8, FLOAT8):
        raise Unsupported(f"{q_dtype} is asked for; activations are quantized to int8 or {FLOAT8}")
    return q_dtype or torch.int8


def check_gated_output(out_inv_scale: Tensor | None, out_dtype: torch.dtype, channels: int) -> None:
    """Accept an output that is 8 bit with an inverse scale for it, or one for each channel, and floating without.

    Raises:
        Unsupported: another dtype, or another number of scales.
    """
    is_eight_bit = out_dtype in (torch.int8, FLOAT8)
    if is_eight_bit != (out_inv_scale is not None) or not (is_eight_bit or out_dtype.is_floating_point):
        given = "no inverse scale" if out_inv_scale is None else "an inverse scale"
        raise Unsupported(f"an output of {out_dtype} with {given}; int8 and {FLOAT8} have one, floats have none")
    if out_inv_scale is not None and out_inv_scale.numel() not in (1, channels):
        raise Unsupported(f"{out_inv_scale.numel()} inverse scales of the output, must be 1 or {channels}")


def check_float8(device: torch.device) -> None:
    """Accept a GPU that has e4m3 in its instructions, and any device that is none: an interpreter has.

    Raises:
        Unsupported: its compute capability is below 8.9; said once as a warning, too.
    """
    capability = gpu_of(device).capability
    if capability < FLOAT8_FROM:
        why = f"FP8 needs compute capability 8.9 or newer, this is {capability // 10}.{capability % 10}"
        warn_once(f"{why}: FP8 layers run by their definition on {device}, slowly; choose w8a8 schemes for this GPU")
        raise Unsupported(why)
