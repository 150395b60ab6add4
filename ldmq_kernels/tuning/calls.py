"""A call of every op that the tuner measures, at every shape of the models, on random operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats.int4 import group_count
from ldmq_kernels.tuning.shapes import Conv2d, Input, Linear, merged_of, of_models

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


# no backend measures tiles for these, but backends are measured against each other
PRODUCERS = (
    "quantize_static",
    "quantize_per_token",
    "quantize_per_sample",
    "group_norm_silu_quantize",
    "geglu_quantize",
)
GROUPS, EPS = 32, 1e-5
STATIC, PER_TOKEN, PER_SAMPLE = "static", "per token", "per sample"


@dataclass(frozen=True)
class Call:
    """A call of `op` at a shape; `make` gives its arguments."""

    op: str
    shape: Linear | Conv2d | Input
    make: Callable[[], tuple[Any, ...]]


def calls(names: tuple[str, ...], models: tuple[str, ...], device: torch.device) -> Iterator[Call]:
    """The ops of these names at the shapes of these models, as layers ask for them, the most work first.

    A pointwise convolution is a linear; projections of one input may be one product.
    """
    linears, convolutions = of_models(*models)
    pointwise = [s for s in convolutions if s.kernel == s.stride == s.upsample == 1]
    linears = [*linears, *(Linear(s.count, s.n * s.size**2, s.c, s.k) for s in pointwise), *merged_of(*models)]
    convolutions = [shape for shape in convolutions if shape not in pointwise]
    for op in names:
        if op in PRODUCERS:
            inputs = _inputs(op, linears, convolutions)
            yield from (Call(op, shape, partial(_producer, op, shape, device)) for shape in inputs)
        elif op.startswith("linear"):
            yield from (Call(op, shape, partial(linear_arguments, op, shape, device)) for shape in linears)
        else:
            yield from (Call(op, shape, partial(conv2d_arguments, op, shape, device)) for shape in convolutions)


def _inputs(op: str, linears: list[Linear], convolutions: list[Conv2d]) -> list[Input]:
    """What an op quantizes before these layers, each shape once."""
    tokens = [(s.m, s.k) for s in linears]
    pictures = [(s.n, s.c, s.size, s.size) for s in convolutions]
    gated = [(s.m, s.n) for s in linears if s.n == 8 * s.k]  # value and gate of a feed-forward layer four times as wide
    normed = [sizes for sizes in pictures if sizes[1] % GROUPS == 0]
    asked: dict[str, list[tuple[list[Any], str]]] = {
        "quantize_static": [(tokens, STATIC), (pictures, STATIC)],
        "quantize_per_token": [(tokens, PER_TOKEN)],
        "quantize_per_sample": [(pictures, PER_SAMPLE)],
        "group_norm_silu_quantize": [(normed, STATIC), (normed, PER_SAMPLE), (normed, PER_TOKEN)],
        "geglu_quantize": [(gated, STATIC), (gated, PER_TOKEN)],
    }
    return [Input(sizes, scale) for found, scale in asked[op] for sizes in dict.fromkeys(found)]


def _int8(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def _positive(device: torch.device, *shape: int) -> Tensor:
    return torch.rand(shape, device=device) * 1e-3 + 1e-4


def _int4(device: torch.device, *shape: int) -> tuple[Tensor, Tensor]:
    """Packed int4, of which none is -8, and the multipliers of its groups."""
    low, high = (torch.randint(-7, 8, (*shape[:-1], -(-shape[-1] // 2)), device=device) for _ in range(2))
    multiplier = torch.randint(1, 19, (*shape[:-1], group_count(shape[-1])), dtype=torch.uint8, device=device)
    return ((low & 15) | ((high & 15) << 4)).to(torch.uint8), multiplier


def linear_arguments(op: str, shape: Linear, device: torch.device) -> tuple[Any, ...]:
    """Random operands of a linear op in half precision."""
    m, k, n, half = shape.m, shape.k, shape.n, torch.float16
    x, scale, bias = torch.randn(m, k, device=device).to(half), _positive(device, n), torch.zeros(n, device=device)
    one = _positive(device, 1)
    if op == "linear_w8a16":
        return x, _int8(device, n, k), scale, bias
    if op == "linear_w4a16":
        return x, _int4(device, n, k)[0], _positive(device, n, group_count(k)), bias
    if op == "linear_static_w8a8":
        return x, one, one, _int8(device, n, k), scale, bias, None
    weight = (_int8(device, n, k),) if op == "linear_w8a8" else _int4(device, n, k)
    return _int8(device, m, k), one, *weight, scale, bias, None, half


def conv2d_arguments(op: str, shape: Conv2d, device: torch.device) -> tuple[Any, ...]:
    """Random operands of a convolution in half precision."""
    half, pad = torch.float16, shape.kernel // 2
    taps = (shape.k, shape.kernel, shape.kernel, shape.c)
    kernel, stride = (shape.kernel, shape.kernel), (shape.stride, shape.stride)
    geometry = (kernel, stride, (pad,) * 4, (1, 1), 1, shape.upsample)
    x_q = _int8(device, shape.n, shape.size, shape.size, shape.c).permute(0, 3, 1, 2)
    scale, bias, one = _positive(device, shape.k), torch.zeros(shape.k, device=device), _positive(device, 1)
    if op == "conv2d_w8a16":
        return x_q.to(half), _int8(device, *taps), scale, bias, *geometry
    weight = (_int8(device, *taps),) if op == "conv2d_w8a8" else _int4(device, *taps)
    return x_q, one, *weight, scale, bias, None, None, *geometry, half


def _producer(op: str, shape: Input, device: torch.device) -> tuple[Any, ...]:
    x = torch.randn(shape.sizes, device=device).to(torch.float16)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    channel_dim = 1 if x.dim() == 4 else -1
    inv_scale = 1 / _positive(device, 1) if shape.scale == STATIC else None
    if op == "quantize_static":
        return x, inv_scale, channel_dim
    if op.startswith("quantize"):
        return x, None
    if op == "geglu_quantize":
        return x, inv_scale, None
    weight = torch.ones(shape.sizes[1], dtype=x.dtype, device=device)
    is_activated = shape.scale != PER_TOKEN  # before a linear, a norm has no SiLU
    return x, weight, torch.zeros_like(weight), GROUPS, EPS, is_activated, inv_scale, None, shape.scale == PER_TOKEN
