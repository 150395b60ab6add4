"""Operands from the factory of every op, and the cases of ops that are measured beside the same baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness.baselines import compiled, lazily
from benchmarks.harness.cases import Case
from benchmarks.harness.machine import device, dtype
from benchmarks.harness.timing import Call, Variants
from ldmq_kernels import ops
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.ops import spec_of
from ldmq_kernels.ops.operands import example
from ldmq_kernels.tuning.calls import sizes_of
from ldmq_kernels.tuning.shapes import Conv2d, Input, Linear

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT_BYTES = 2  # of `machine.dtype`, on every device
EAGER, WITH_COMPILED = ("eager", "copy"), ("eager", "compiled", "copy")


class Sizes(NamedTuple):
    """Elements of a producer's input and output, and how often it has to read its input."""

    inputs: int
    outputs: int
    reads: int = 1


def operands_of(op: str, shape: Linear | Conv2d | Input, *, is_packed: bool = True) -> SimpleNamespace:
    """The arguments of a call of an op by name, in its order.

    Args:
        op: its name.
        shape: of the layer, or of the input of an op that quantizes.
        is_packed: whether the weight is as a layer holds it on this device, and not as a checkpoint does.
    """
    spec = spec_of(op)
    sizes = replace(sizes_of(spec, shape), has_normal_integers=True)
    named = spec.call(*example(op, sizes, device(), dtype(), made_on=device()))
    packer = dispatch.packer(op, device()) if spec.is_product and is_packed else None
    if packer is not None:
        named.weight = packer.pack(named.weight, getattr(named, "multiplier", None), sizes.channels)
    return named


def call_of(op: str, named: SimpleNamespace) -> Call:
    """The op called with these arguments."""
    function, arguments = getattr(ops, op), tuple(vars(named).values())
    return lambda: function(*arguments)


def normal(*shape: int) -> Tensor:
    """Standard normal values in the dtype that models use on this device."""
    return torch.randn(shape, device=device()).to(dtype())


def image(shape: Conv2d) -> Tensor:
    """Normal values (N, C, H, W), channels_last."""
    return normal(shape.n, shape.c, shape.size, shape.size).contiguous(memory_format=torch.channels_last)


def input_of(shape: Linear | Conv2d, scale: str) -> Input:
    """What a layer quantizes before it, by a scale of this kind."""
    return Input((shape.m, shape.k) if isinstance(shape, Linear) else (shape.n, shape.c, shape.size, shape.size), scale)


# -- cases of linears and convolutions ---------------------------------------------------------------------


def linear_case(
    op: str, shape: Linear, make: Callable[[], Variants], *, bits: tuple[int, int], others: tuple[str, ...] = ()
) -> Case:
    """A linear beside torch's.

    Args:
        make: ours, the float linears, and `others`.
        bits: of a weight and of an activation as the op takes them.
    """
    m, k, n = shape.m, shape.k, shape.n
    weight_bits, x_bits = bits
    moved = (m * k * x_bits + n * k * weight_bits) // 8 + m * n * FLOAT_BYTES
    baselines = (*FLOATS, "compiled", *others)
    return Case(op, {"M": m, "K": k, "N": n}, shape.count, baselines, make, 2e-9 * m * k * n, moved)


def float_linears(shape: Linear, x: Tensor) -> Variants:
    """nn.Linear of this shape in each float dtype, and compiled in the model's."""

    def build(dtype: torch.dtype) -> Call:
        layer = nn.Linear(shape.k, shape.n, device=device(), dtype=dtype)
        x_float = x.to(dtype)
        return lambda: layer(x_float)

    def build_compiled() -> Call:
        layer = nn.Linear(shape.k, shape.n, device=device(), dtype=x.dtype)
        return lambda: compiled(nn.functional.linear)(x, layer.weight, layer.bias)

    found: Variants = {name: lazily(lambda d=d: build(d)) for name, d in FLOATS.items()}
    return found | {"compiled": lazily(build_compiled)}


def of_image(shape: Conv2d) -> dict[str, int]:
    """The shape of a convolution's input in a results file."""
    return {"N": shape.n, "C": shape.c, "H": shape.size, "W": shape.size}


def described(shape: Conv2d) -> dict[str, int]:
    """A convolution's shape in a results file."""
    found = of_image(shape) | {"K": shape.k, "kernel": shape.kernel}
    return found | {name: getattr(shape, name) for name in ("stride", "upsample") if getattr(shape, name) > 1}


def conv2d_case(op: str, shape: Conv2d, make: Callable[[], Variants], *, bits: tuple[int, int]) -> Case:
    """A convolution beside torch's.

    Args:
        bits: of a weight and of an activation as the op takes them.
    """
    m, n, k = shape.product
    weight_bits, x_bits = bits
    moved = (shape.n * shape.c * shape.size**2 * x_bits + n * k * weight_bits) // 8 + m * n * FLOAT_BYTES
    work, on_request = 2e-9 * m * n * k, ("compiled",)
    return Case(op, described(shape), shape.count, tuple(FLOATS), make, work, moved, on_request=on_request)


def float_convolutions(shape: Conv2d, x: Tensor) -> Variants:
    """nn.Conv2d of this shape in each float dtype, channels_last, by cuDNN's fastest algorithm, and compiled.

    Before it, the enlargement of its input where the shape has one.
    """
    torch.backends.cudnn.benchmark = True

    def layer(dtype: torch.dtype) -> nn.Module:
        pad = shape.kernel // 2
        made = nn.Conv2d(shape.c, shape.k, shape.kernel, shape.stride, pad, device=device(), dtype=dtype)
        made = made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return made if shape.upsample == 1 else nn.Sequential(nn.Upsample(scale_factor=shape.upsample), made)

    def build(dtype: torch.dtype) -> Call:
        convolution, x_float = layer(dtype), x.to(dtype)
        return lambda: convolution(x_float)

    def build_compiled() -> Call:
        convolution = torch.compile(layer(x.dtype))
        return lambda: convolution(x)

    found: Variants = {name: lazily(lambda d=d: build(d)) for name, d in FLOATS.items()}
    return found | {"compiled": lazily(build_compiled)}


# -- cases of producers ------------------------------------------------------------------------------------


def producer_case(
    op: str,
    shape: dict[str, int],
    count: int,
    make: Callable[[], Variants],
    sizes: Sizes,
    baselines: tuple[str, ...] = EAGER,
) -> Case:
    """An op that is bound by memory: it reads its input, some twice for statistics, and writes int8."""
    inputs, outputs, reads = sizes
    moved = inputs * FLOAT_BYTES * reads + outputs
    return Case(op, shape, count, baselines, make, moved=moved, input_bytes=inputs * FLOAT_BYTES)
