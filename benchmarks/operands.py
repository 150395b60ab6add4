"""Random operands, and the rivals that every op of a kind is measured beside."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import Variants, device
from benchmarks.shapes import Conv2d, Linear
from ldmq_kernels.kernels.cpu.packing import pack_conv2d, pack_linear

FLOAT_RIVALS = ("cublas_fp16",) if torch.cuda.is_available() else ("torch_fp32", "torch_bf16")
CONV_RIVALS = ("cudnn_fp16",) if torch.cuda.is_available() else FLOAT_RIVALS
DTYPE = torch.float16 if torch.cuda.is_available() else torch.bfloat16


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
    """kernel_size, stride, padding, dilation and groups of a convolution that keeps its size."""
    pad = shape.kernel // 2
    return (shape.kernel, shape.kernel), (1, 1), (pad, pad), (1, 1), 1


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
    """nn.Conv2d of this shape in the model's dtypes, channels_last, by cuDNN's fastest algorithm."""
    torch.backends.cudnn.benchmark = True
    pad = shape.kernel // 2
    layers = {
        name: torch.nn.Conv2d(shape.c, shape.k, shape.kernel, padding=pad, device=device()) for name in CONV_RIVALS
    }
    return {
        name: _float_call(layer.to(memory_format=torch.channels_last), x, name)  # type: ignore[call-overload]
        for name, layer in layers.items()
    }


def _float_call(layer: torch.nn.Module, x: Tensor, name: str) -> Callable[[], Tensor]:
    dtype = torch.float32 if name.endswith("fp32") else DTYPE
    layer, x = layer.to(dtype), x.to(dtype)
    return lambda: layer(x)


def linear_work(shape: Linear) -> float:
    """Billions of operations of a linear."""
    return 2e-9 * shape.m * shape.k * shape.n


def conv2d_work(shape: Conv2d) -> float:
    """Billions of operations of a convolution."""
    return 2e-9 * shape.n * shape.size**2 * shape.c * shape.k * shape.kernel**2
