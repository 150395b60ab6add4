"""Norms and activation functions in C with the quantization of their results: float32 throughout, one pass or two.

They are `activations.c`, `layer_norm.c` and `group_norm.c`, which read operands unseen: all are checked here. What does
not fit is refused, and the definition tells what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldmq_kernels.kernels.backend import Unsupported
from ldmq_kernels.kernels.cpu import compiled
from ldmq_kernels.kernels.cpu.compiled import HAS_NAN, NO_MEMORY
from ldmq_kernels.kernels.geometry import check_channels
from ldmq_kernels.kernels.reference.producers import no_scale
from ldmq_kernels.kernels.reference.quantize_static import nan_error

SILU, GELU, GELU_TANH, GEGLU = range(4)  # as activations.c has them


def takes(x: Tensor, q_dtype: torch.dtype | None) -> bool:
    """Whether a producer of int8 is one of these: there is a library, and x is float32 or bfloat16."""
    return q_dtype in (None, torch.int8) and compiled.takes(x)


def activate(x: Tensor, activation: int, inv_scale: Tensor | None, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize activation(x) for x (..., C), or (..., 2 C) of GEGLU.

    Raises:
        ValueError: there is NaN where the scale is calibrated, or there are other factors than 1 or C.
    """
    x = x.contiguous()
    *leading, columns = x.shape
    if activation == GEGLU:
        columns //= 2
    q = x.new_empty((*leading, columns), dtype=torch.int8)
    scale, factors = _scale_of(x, leading, inv_scale), _factors(columns, inv_scale, inv_smooth)
    if q.numel():
        _run(
            "ldmq_activate_quantize",
            x,
            *(x.data_ptr(), x.dtype == torch.bfloat16, q.numel() // columns, columns, activation),
            *_quantization(factors, q, scale, inv_scale),
        )
    return q, scale


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    modulation: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Quantize layer_norm(x) * (1 + modulation[0]) + modulation[1] for x (..., C).

    Raises:
        Unsupported: a parameter or a modulation does not fit x.
        ValueError: there is NaN where the scale is calibrated, or there are other factors than 1 or C.
    """
    x = x.contiguous()
    *leading, columns = x.shape
    q = torch.empty_like(x, dtype=torch.int8)
    scale, factors = _scale_of(x, leading, inv_scale), _factors(columns, inv_scale, inv_smooth)
    weight, bias = _parameters(columns, weight, bias)
    if q.numel():
        rows = q.numel() // columns
        multiplier, shift = (_runs(term, rows, columns) for term in modulation)
        _run(
            "ldmq_layer_norm_quantize",
            x,
            *(x.data_ptr(), x.dtype == torch.bfloat16, rows, columns),
            *(*_addresses(weight, bias), eps),
            *(compiled.address(multiplier), 0 if multiplier is None else multiplier.shape[0]),
            *(compiled.address(shift), 0 if shift is None else shift.shape[0]),
            *_quantization(factors, q, scale, inv_scale),
        )
    return q, scale


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    per_token: bool,
) -> tuple[Tensor, Tensor]:
    """Quantize group_norm(x), or its SiLU, for x (N, C, H, W); the scales are (N,), or (N, H, W) per token.

    Raises:
        Unsupported: a parameter does not fit x, or the groups do not.
        ValueError: there is NaN where the scale is calibrated, or there are other factors than 1 or C.
    """
    samples, channels, *size = x.shape
    if groups < 1 or channels % groups or x.numel() == groups:
        raise Unsupported(f"{groups} groups of an input of shape {tuple(x.shape)}")
    x = x.contiguous(memory_format=torch.channels_last)
    q = torch.empty_like(x, dtype=torch.int8)
    scale = _scale_of(x, (samples, *size) if per_token else (samples,), inv_scale)
    factors = _factors(channels, inv_scale, inv_smooth)
    weight, bias = _parameters(channels, weight, bias)
    if q.numel():
        _run(
            "ldmq_group_norm_quantize",
            x,
            *(x.data_ptr(), x.dtype == torch.bfloat16, samples, math.prod(size), channels, groups),
            *(*_addresses(weight, bias), eps, silu, per_token),
            *_quantization(factors, q, scale, inv_scale),
        )
    return q, scale


def _run(name: str, x: Tensor, *operands: float) -> None:
    status = compiled.call(name, compiled.threads(x), *operands)
    if status & NO_MEMORY:
        raise MemoryError("there is no memory for the rows that an activation or a norm is computed in")
    if status & HAS_NAN:
        raise nan_error()


def _scale_of(x: Tensor, shape: Sequence[int], inv_scale: Tensor | None) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32) if inv_scale is None else no_scale(x)


def _factors(channels: int, inv_scale: Tensor | None, inv_smooth: Tensor | None) -> Tensor | None:
    factors = inv_smooth if inv_scale is None else inv_scale
    if factors is None:
        return None
    check_channels(channels, factors)
    return compiled.in_float32(factors)


def _quantization(factors: Tensor | None, q: Tensor, scale: Tensor, inv_scale: Tensor | None) -> tuple[int, ...]:
    """The operands of a `Quantization` of producers.h."""
    measured = scale.data_ptr() if inv_scale is None else 0
    return compiled.address(factors), 0 if factors is None else factors.numel(), q.data_ptr(), measured


def _parameters(channels: int, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A norm's weight and bias of one dtype that C reads, contiguous."""
    is_narrow = True
    for parameter in (weight, bias):
        if parameter is not None:
            is_narrow = is_narrow and parameter.dtype == torch.bfloat16
            if parameter.shape != (channels,):
                found = tuple(parameter.shape)
                raise Unsupported(f"a norm's parameter of shape {found}, the input has {channels} channels")
    read = Tensor.contiguous if is_narrow else compiled.in_float32
    return None if weight is None else read(weight), None if bias is None else read(bias)


def _addresses(weight: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    one = weight if bias is None else bias
    return compiled.address(weight), compiled.address(bias), one is not None and one.dtype == torch.bfloat16


def _runs(term: Tensor | None, rows: int, columns: int) -> Tensor | None:
    """A modulation as (runs, C) float32, contiguous."""
    if term is None:
        return None
    if term.shape[-1] != columns or not term.numel() or rows % (term.numel() // columns):
        raise Unsupported(f"a modulation of shape {tuple(term.shape)} for {rows} rows of {columns}")
    return term.reshape(-1, columns).float().contiguous()
