"""How long an op takes at a size that keeps a GPU busy, and torch in float16 for the same layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.ops import spec_of
from ldmq_kernels.ops.operands import of_value_and_gate
from ldmq_kernels.timing import interleaved
from ldmq_kernels.tuning.calls import arguments
from ldmq_kernels.tuning.shapes import Conv2d, Linear

LINEAR = Linear(1, 4096, 1280, 1280)
CONVOLUTION = Conv2d(1, 2, 320, 64, 320)
LEGEND = (
    f"linears and convolutions are timed at {LINEAR.m}x{LINEAR.k} to {LINEAR.n} and, with a 3x3 kernel, at "
    f"{CONVOLUTION.n}x{CONVOLUTION.c}x{CONVOLUTION.size}x{CONVOLUTION.size} to {CONVOLUTION.k}, in turns with torch's "
    "in float16; quantizing what they take is not part of it. Other ops are timed at a small size"
)


def geglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The linear whose outputs are values and gates, and its GEGLU, by torch."""
    value, gate = torch.nn.functional.linear(x, weight, bias).chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


def _rivals(op: str, device: torch.device) -> tuple[tuple[Any, ...], Callable[[], Any]]:
    """An op's arguments, and the same layer in float16."""
    half: dict[str, Any] = {"dtype": torch.float16, "device": device}
    if not spec_of(op).shape.takes_pictures:
        x, weight = torch.randn(LINEAR.m, LINEAR.k, **half), torch.randn(LINEAR.n, LINEAR.k, **half)
        layer = geglu if spec_of(op).example is of_value_and_gate else torch.nn.functional.linear
        return arguments(spec_of(op), LINEAR, device), partial(layer, x, weight, x.new_zeros(LINEAR.n))
    s = CONVOLUTION
    picture, weight = torch.randn(s.n, s.c, s.size, s.size, **half), torch.randn(s.k, s.c, s.kernel, s.kernel, **half)
    picture, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (picture, weight))
    bias = picture.new_zeros(s.k)
    call = partial(torch.nn.functional.conv2d, picture, weight, bias, s.stride, s.kernel // 2)
    return arguments(spec_of(op), s, device), call


@torch.inference_mode()
def measure(op: str, function: Callable[..., Any], device: torch.device) -> tuple[float, float] | None:
    """Time a backend's linear or convolution.

    Args:
        op: its name.
        function: the backend's.
        device: a GPU.

    Returns:
        Median milliseconds, and how many times as fast as torch's in float16 that is; None for other ops, and where
        the backend refuses the size.
    """
    if not spec_of(op).is_product:
        return None
    operands, rival = _rivals(op, device)
    call = partial(function, *operands)
    try:
        call()
    except Unsupported:
        return None
    ours, theirs = (taken.median for taken in interleaved({"ours": call, "float16": rival}, device).values())
    return ours, theirs / ours
