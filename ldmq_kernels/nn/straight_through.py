"""Gradients of quantized layers: straight through the rounding, for the weight that the integers stand for.

A layer's output is computed by its integers; its gradients are those of the float layer with the dequantized weight, as
if the input had not been rounded, also where it was cut off by a calibrated range. So an adapter on the layer, or the
latents, can be optimized; the weight cannot. Nothing is kept for the backward pass but the layer: the weight is
dequantized again, as in QLoRA (Dettmers et al., arXiv 2305.14314).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ldmq_kernels.nn.quantized import QuantizedLayer


def is_differentiated(layer: QuantizedLayer, x: Tensor) -> bool:
    """Whether a call of a layer has to be part of autograd's graph."""
    return torch.is_grad_enabled() and (x.requires_grad or (layer.bias is not None and layer.bias.requires_grad))


def straight_through(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """A layer's output, with gradients for the input and the bias."""
    return _StraightThrough.apply(x, layer.bias, layer)


class _StraightThrough(torch.autograd.Function):
    """The integers forward, the dequantized weight backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLayer) -> Tensor:
        """Compute, which torch does without gradients here."""
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradients of the input and of the bias."""
        (gradient,) = gradients
        of_input, of_bias = None, None
        layer: QuantizedLayer = ctx.layer
        if ctx.needs_input_grad[0]:
            weight = layer.from_channels_last(layer.real_weight()).to(gradient.dtype)
            of_input = layer.input_gradient(gradient, weight, ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            channels = layer.channel_axis % gradient.dim()
            others = [axis for axis in range(gradient.dim()) if axis != channels]
            of_bias = gradient.float().sum(others).to(ctx.bias_dtype) if others else gradient.to(ctx.bias_dtype)
        return of_input, of_bias, None
