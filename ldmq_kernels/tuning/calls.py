"""A call of every op with a tile, at every shape of the models, on random operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels import ops
from ldmq_kernels.numerics.affine import group_count
from ldmq_kernels.tuning.shapes import Conv2d, Linear, merged_of, of_models

OPS = (
    "linear_w8a8",
    "conv2d_w8a8",
    "linear_static_w8a8",
    "linear_w4a8",
    "conv2d_w4a8",
    "linear_w8a16",
    "conv2d_w8a16",
    "linear_w4a16",
)


@dataclass(frozen=True)
class Call:
    """A call of `op` at a shape; `make` gives it operands."""

    op: str
    shape: Linear | Conv2d
    make: Callable[[], Callable[[], Any]]


def calls(names: tuple[str, ...], models: tuple[str, ...], device: torch.device) -> Iterator[Call]:
    """The ops of these names at the shapes of these models, as layers ask for them, the most work first.

    A pointwise convolution is a linear; projections of one input may be one product.
    """
    linears, convolutions = of_models(*models)
    pointwise = [s for s in convolutions if s.kernel == s.stride == s.upsample == 1]
    linears = [*linears, *(Linear(s.count, s.n * s.size**2, s.c, s.k) for s in pointwise), *merged_of(*models)]
    convolutions = [shape for shape in convolutions if shape not in pointwise]
    for op in names:
        if op.startswith("linear"):
            yield from (Call(op, shape, partial(_linear, op, shape, device)) for shape in linears)
        else:
            yield from (Call(op, shape, partial(_conv2d, op, shape, device)) for shape in convolutions)


def _int8(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def _positive(device: torch.device, *shape: int) -> Tensor:
    return torch.rand(shape, device=device) * 1e-3 + 1e-4


def _int4(device: torch.device, *shape: int) -> tuple[Tensor, Tensor]:
    """Packed int4, of which none is -8, and the multipliers of its groups."""
    low, high = (torch.randint(-7, 8, (*shape[:-1], -(-shape[-1] // 2)), device=device) for _ in range(2))
    multiplier = torch.randint(1, 19, (*shape[:-1], group_count(shape[-1])), dtype=torch.uint8, device=device)
    return ((low & 15) | ((high & 15) << 4)).to(torch.uint8), multiplier


def _linear(op: str, shape: Linear, device: torch.device) -> Callable[[], Any]:
    m, k, n, half = shape.m, shape.k, shape.n, torch.float16
    x, scale, bias = torch.randn(m, k, device=device).to(half), _positive(device, n), torch.zeros(n, device=device)
    one, function = _positive(device, 1), getattr(ops, op)
    if op == "linear_w8a16":
        return partial(function, x, _int8(device, n, k), scale, bias)
    if op == "linear_w4a16":
        return partial(function, x, _int4(device, n, k)[0], _positive(device, n, group_count(k)), bias)
    if op == "linear_static_w8a8":
        return partial(function, x, one, one, _int8(device, n, k), scale, bias, None)
    weight = (_int8(device, n, k),) if op == "linear_w8a8" else _int4(device, n, k)
    return partial(function, _int8(device, m, k), one, *weight, scale, bias, None, half)


def _conv2d(op: str, shape: Conv2d, device: torch.device) -> Callable[[], Any]:
    half, function, pad = torch.float16, getattr(ops, op), shape.kernel // 2
    taps = (shape.k, shape.kernel, shape.kernel, shape.c)
    kernel, stride = (shape.kernel, shape.kernel), (shape.stride, shape.stride)
    geometry = (kernel, stride, (pad,) * 4, (1, 1), 1, shape.upsample)
    x_q = _int8(device, shape.n, shape.size, shape.size, shape.c).permute(0, 3, 1, 2)
    scale, bias, one = _positive(device, shape.k), torch.zeros(shape.k, device=device), _positive(device, 1)
    if op == "conv2d_w8a16":
        return partial(function, x_q.to(half), _int8(device, *taps), scale, bias, *geometry)
    weight = (_int8(device, *taps),) if op == "conv2d_w8a8" else _int4(device, *taps)
    return partial(function, x_q, one, *weight, scale, bias, None, None, *geometry, half)
