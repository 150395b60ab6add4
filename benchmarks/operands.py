"""Random operands, and the rivals that every op of a kind is measured beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common import Case, Variants, device
from benchmarks.shapes import Conv2d, Linear
from ldmq_kernels.kernels.cpu.packing import pack_conv2d, pack_linear

FLOAT_RIVALS = ("cublas_fp16",) if torch.cuda.is_available() else ("torch_fp32", "torch_bf16")
CONV_RIVALS = ("cudnn_fp16",) if torch.cuda.is_available() else FLOAT_RIVALS
DTYPE = torch.float16 if torch.cuda.is_available() else torch.bfloat16

BYTES = torch.finfo(DTYPE).bits // 8


class Sizes(NamedTuple):
    """Elements of a producer's input and output, and how often it has to read its input."""

    inputs: int
    outputs: int
    reads: int = 1


def normal(*shape: int) -> Tensor:
    """Standard normal values in the dtype that models use on this device."""
    return torch.randn(shape, device=device()).to(DTYPE)


def integers(*shape: int) -> Tensor:
    """int8 of normal values with the largest at 127, as quantization makes them."""
    values = torch.randn(shape, device=device())
    return (values * (127 / values.abs().amax())).round_().to(torch.int8)


def scales(count: int) -> Tensor:
    """Positive float32 scales."""
    return torch.rand(count, device=device()) * 1e-3 + 1e-4


def linear_weight(n: int, k: int) -> Tensor:
    """An int8 weight as a layer holds it on this device."""
    weight = integers(n, k)
    return weight if weight.is_cuda else pack_linear(weight)


def geometry(shape: Conv2d) -> tuple:
    """kernel_size, stride, padding, dilation, groups and upsample, as the ops take them."""
    pad = shape.kernel // 2
    return (shape.kernel, shape.kernel), (shape.stride, shape.stride), (pad,) * 4, (1, 1), 1, shape.upsample


def of_image(shape: Conv2d) -> dict[str, int]:
    """The shape of a convolution's input in a results file."""
    return {"N": shape.n, "C": shape.c, "H": shape.size, "W": shape.size}


def described(shape: Conv2d) -> dict[str, int]:
    """A convolution's shape in a results file."""
    found = of_image(shape) | {"K": shape.k, "kernel": shape.kernel}
    return found | {name: getattr(shape, name) for name in ("stride", "upsample") if getattr(shape, name) > 1}


def conv2d_weight(shape: Conv2d) -> Tensor:
    """An int8 weight as a layer holds it on this device."""
    weight = integers(shape.k, shape.kernel, shape.kernel, shape.c)
    return weight if weight.is_cuda else pack_conv2d(weight)


def image(shape: Conv2d) -> Tensor:
    """Normal values (N, C, H, W), channels_last."""
    return normal(shape.n, shape.c, shape.size, shape.size).contiguous(memory_format=torch.channels_last)


def float_linears(shape: Linear, x: Tensor) -> Variants:
    """nn.Linear of this shape in the model's dtypes."""
    layers = {name: torch.nn.Linear(shape.k, shape.n, device=device()) for name in FLOAT_RIVALS}
    return {name: _float_call(layer, x, name) for name, layer in layers.items()}


def float_convolutions(shape: Conv2d, x: Tensor) -> Variants:
    """nn.Conv2d of this shape in the model's dtypes, channels_last, by cuDNN's fastest algorithm.

    Before it, the enlargement of its input where the shape has one.
    """
    torch.backends.cudnn.benchmark = True
    pad = shape.kernel // 2
    layers = {
        name: torch.nn.Conv2d(shape.c, shape.k, shape.kernel, shape.stride, pad, device=device())
        for name in CONV_RIVALS
    }
    return {
        name: _float_call(_enlarged(layer.to(memory_format=torch.channels_last), shape), x, name)  # type: ignore[call-overload]
        for name, layer in layers.items()
    }


def _enlarged(layer: torch.nn.Module, shape: Conv2d) -> torch.nn.Module:
    if shape.upsample == 1:
        return layer
    return torch.nn.Sequential(torch.nn.Upsample(scale_factor=shape.upsample, mode="nearest"), layer)


def _float_call(layer: torch.nn.Module, x: Tensor, name: str) -> Callable[[], Tensor]:
    dtype = torch.float32 if name.endswith("fp32") else DTYPE
    layer, x = layer.to(dtype), x.to(dtype)
    return lambda: layer(x)


def linear_work(shape: Linear) -> float:
    """Billions of operations of a linear."""
    return 2e-9 * shape.m * shape.k * shape.n


def conv2d_work(shape: Conv2d) -> float:
    """Billions of operations of a convolution."""
    return 2e-9 * shape.n * shape.out_size**2 * shape.c * shape.k * shape.kernel**2


def conv2d_case(op: str, shape: Conv2d, make: Callable[[], Variants]) -> Case:
    """A convolution beside the float ones."""
    return Case(op, described(shape), shape.count, CONV_RIVALS, make, conv2d_work(shape))


def producer_case(
    op: str, described: dict[str, int], count: int, rivals: tuple[str, ...], make: Callable[[], Variants], sizes: Sizes
) -> Case:
    """An op that is bound by memory: it reads its input, some twice for statistics, and writes int8."""
    inputs, outputs, reads = sizes
    moved = inputs * BYTES * reads + outputs
    return Case(op, described, count, rivals, make, moved=moved, input_bytes=inputs * BYTES)
