"""A call of every op that the tuner measures, at every shape of the models, on random operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ldmq_kernels.kernels.op_spec import OpSpec
from ldmq_kernels.ops import spec_of
from ldmq_kernels.ops.operands import NORM, Shape, example, of_gated, of_picture, of_value_and_gate
from ldmq_kernels.tuning.shapes import Conv2d, Input, Linear, merged_of, of_models

NORM_GROUPS = 32
GEGLU_WIDENING = 8  # a feed-forward's values, four times as wide as its input, and as many gates
STATIC, PER_TOKEN, PER_SAMPLE = "static", "per token", "per sample"


@dataclass(frozen=True)
class Call:
    """A call of `op` at a shape; `make` gives its arguments."""

    op: str
    shape: Linear | Conv2d | Input
    make: Callable[[], tuple[Any, ...]]

    @property
    def work(self) -> int:
        """Products of all calls of a model, by which the tuner orders; 0 of an op that only quantizes."""
        if isinstance(self.shape, Input):
            return 0
        m, n, k = self.shape.product
        return self.shape.count * m * n * k


def calls(names: tuple[str, ...], models: tuple[str, ...], device: torch.device) -> Iterator[Call]:
    """The ops of these names at the shapes of these models, as layers ask for them, the most work first.

    A pointwise convolution is a linear; projections of one input may be one product.
    """
    linears, convolutions = of_models(*models)
    pointwise = [s for s in convolutions if s.kernel == s.stride == s.upsample == 1]
    linears = [*linears, *(Linear(s.count, s.n * s.size**2, s.c, s.k) for s in pointwise), *merged_of(*models)]
    convolutions = [shape for shape in convolutions if shape not in pointwise]
    for op in names:
        spec = spec_of(op)
        shapes: Sequence[Linear | Conv2d | Input]
        if not spec.is_product:
            shapes = _inputs(spec, linears, convolutions)
        else:
            shapes = convolutions if spec.shape.takes_pictures else linears
            if spec.example is of_value_and_gate:
                shapes = [s for s in linears if s.n == GEGLU_WIDENING * s.k]
        yield from (Call(op, shape, partial(arguments, spec, shape, device)) for shape in shapes)


def _inputs(spec: OpSpec, linears: list[Linear], convolutions: list[Conv2d]) -> list[Input]:
    """What an op quantizes before these layers, each shape once, in each way to scale it that the op has."""
    tokens = [(s.m, s.k) for s in linears]
    if spec.example is of_gated:
        tokens = [(s.m, s.n) for s in linears if s.n == GEGLU_WIDENING * s.k]
    pictures = [(s.n, s.c, s.size, s.size) for s in convolutions]
    if "num_groups" in spec.arguments:
        pictures = [sizes for sizes in pictures if sizes[1] % NORM_GROUPS == 0]
    static = [STATIC] if "inv_scale" in spec.arguments else []
    is_measured = not static or "inv_scale" in spec.optional
    asked: list[tuple[list[Any], str]] = []
    if spec.example is not of_picture:
        asked += [(tokens, scale) for scale in [*static, *([PER_TOKEN] if is_measured else [])]]
    if spec.shape.takes_pictures:
        per_token = [PER_TOKEN] if "per_token" in spec.arguments else []
        asked += [(pictures, scale) for scale in [*static, *([PER_SAMPLE, *per_token] if is_measured else [])]]
    return [Input(sizes, scale) for found, scale in asked for sizes in dict.fromkeys(found)]


def arguments(spec: OpSpec, shape: Linear | Conv2d | Input, device: torch.device) -> tuple[Any, ...]:
    """Random operands of an op in half precision: a bias, scales for the whole, and no residual."""
    return example(spec.name, sizes_of(spec, shape), device, torch.float16, made_on=device)


def sizes_of(spec: OpSpec, shape: Linear | Conv2d | Input) -> Shape:
    """The shape of a call as a layer of a model makes it, with a bias, scales for the whole, and no residual.

    An output that can be quantized is.
    """
    options = NORM | {"bias", "out_inv_scale"}
    if isinstance(shape, Linear):
        return Shape(shape.m, shape.k, shape.n, options=options)
    if isinstance(shape, Conv2d):
        picture, window = (shape.n, shape.size, shape.size), (shape.kernel, shape.stride, shape.upsample)
        return Shape(1, shape.c, shape.k, picture, *window, options=options)
    options |= {"inv_scale"} if shape.scale == STATIC else set()
    if len(shape.sizes) == 2:
        tokens, channels = shape.sizes
        return Shape(tokens, channels // 2 if spec.example is of_gated else channels, options=options)
    samples, channels, height, width = shape.sizes
    return Shape(
        channels=channels,
        picture=(samples, height, width),
        norm_groups=NORM_GROUPS,
        options=options,
        per_token=shape.scale == PER_TOKEN,
        prefers_picture=True,
    )
