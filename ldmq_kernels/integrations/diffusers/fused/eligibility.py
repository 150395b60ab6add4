"""Which children of a block its fused form may compute: layers as they are, with nothing on top."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.nn import QuantConv2d, QuantLinear


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else."""
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def is_unwrapped(module: Any, kind: type) -> bool:
    """Whether a module is exactly of this class, with no hooks."""
    return type(module) is kind and isinstance(module, nn.Module) and is_unhooked(module)


def is_unwrapped_linear(layer: Any) -> bool:
    """Whether a layer is a linear, floating or quantized, with nothing on top."""
    kind = type(layer)
    return kind in (nn.Linear, QuantLinear) and is_unwrapped(layer, kind)


def takes_quantized(layer: Any) -> bool:
    """Whether a layer is unwrapped and needs no more than 8-bit activations, which a producer can give it."""
    kind = type(layer)
    if (kind is not QuantLinear and kind is not QuantConv2d) or not is_unhooked(layer) or not layer.takes_quantized:
        return False
    return kind is QuantLinear or not layer.has_own_convolution


def wants_gradients(module: nn.Module, *tensors: Tensor | None) -> bool:
    """Whether autograd follows a call: integers between fused ops carry no gradients, so layer after layer runs then.

    Args:
        module: whose parameters, of adapters too, may be trained.
        tensors: what goes in.
    """
    if not torch.is_grad_enabled():
        return False
    given = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return given or any(parameter.requires_grad for parameter in module.parameters())


def is_inactive(dropout: Any) -> bool:
    """Whether a dropout does nothing."""
    return is_unwrapped(dropout, nn.Dropout) and (not dropout.training or dropout.p == 0)


def quantized_norm(norm: nn.GroupNorm, x: Tensor, layer: Any, silu: bool, per_token: bool) -> tuple[Tensor, Tensor]:
    """GroupNorm, SiLU where asked for, and the quantization that `layer` wants, in one op; x (N, C, H, W)."""
    return ops.group_norm_silu_quantize(
        x,
        norm.weight,
        norm.bias,
        norm.num_groups,
        norm.eps,
        silu,
        layer.input_inv_scale,
        layer.smoothing,
        per_token,
        *layer.scheme.activations.op_dtype,
    )


def quantized_layer_norm(
    norm: Any, x: Tensor, layer: Any, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """LayerNorm, times 1 + scale, plus shift, and the quantization that `layer` wants, in one op; x (..., C)."""
    op_dtype = layer.scheme.activations.op_dtype
    return ops.layer_norm_quantize(
        x, norm.weight, norm.bias, norm.eps, layer.input_inv_scale, layer.smoothing, scale, shift, *op_dtype
    )
