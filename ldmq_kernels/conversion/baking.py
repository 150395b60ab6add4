"""Convolutions and linears whose weight is made anew in each call, always the same: baked into plain layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_weight_norm

from ldmq_kernels.conversion.convert import ConversionError, replace_modules
from ldmq_kernels.nn.convolution import GEOMETRY
from ldmq_kernels.nn.kinds import CLASSES, float_class, kind_of

M = TypeVar("M", bound=nn.Module)
SIZE = 5  # of an input that tells whether a baked layer computes what its original does, beside the kernel's reach
RELATIVE_ERROR = 1e-3


@torch.no_grad()
def bake(model: M, weights: Mapping[type[nn.Module], Callable[[Any], Tensor]] | None = None) -> M:
    """Put plain layers, which can be quantized, in place of those that make their weight anew in each call.

        ldmq.bake(vae, {ModulatedConv2d: lambda layer: layer.modulated_weight()})
        ldmq.quantize(vae, scheme="w8a8-dynamic")

    Weights that `weight_norm` or another parametrization of torch makes are baked without being named. A layer of a
    class that is named must compute a plain product with the weight that its function gives, as modulated convolutions
    do whose modulation is learned and does not depend on the input: each is called with random numbers before and
    after, and refused where the two differ.

    Args:
        model: in float; changed in place. What is saved of it then has plain weights: it is loaded into a model that
            was baked, too.
        weights: class -> function of one of its layers, subclasses of nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d,
            that gives the effective weight, in the plain layer's shape and layout.

    Returns:
        `model` itself.

    Raises:
        ConversionError: a class is of no such kind, its function gives another shape, or the layer computes something
            else than the product with that weight; the model is as it was.
    """
    named = weights or {}
    for cls in named:
        if not issubclass(cls, tuple(CLASSES.values())):
            raise ConversionError(
                f"{cls.__qualname__} is neither a linear nor a convolution of torch: it has no weight"
            )
    baked: dict[nn.Module, nn.Module] = {}
    for name, layer in model.named_modules():
        function = next((named[cls] for cls in type(layer).__mro__ if cls in named), None)
        if function is not None:
            baked[layer] = _plain(name, layer, function(layer).detach())
    for layer in model.modules():
        if layer not in baked:
            _unparametrized(layer)
    replace_modules(model, baked)
    return model


def _unparametrized(layer: nn.Module) -> None:
    """Keep what a parametrization of the weight gives, and the parametrization no longer."""
    if parametrize.is_parametrized(layer, "weight"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    hooks = layer._forward_pre_hooks.values()
    if any(type(hook).__name__ == "WeightNorm" and getattr(hook, "name", "") == "weight" for hook in hooks):
        remove_weight_norm(layer)


def _plain(name: str, layer: Any, weight: Tensor) -> nn.Module:
    """A plain layer with this weight and the layer's bias, once it is shown to compute the same."""
    kind: Any = float_class(layer)
    if kind_of(layer) == "linear":
        shape: tuple[int, ...] = (2, 3, layer.in_features)
        plain = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    else:
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
        plain = kind(*sizes, groups=layer.groups, bias=layer.bias is not None, device="meta")
        for attribute in GEOMETRY:
            setattr(plain, attribute, getattr(layer, attribute))
        reach = [(k - 1) * d for k, d in zip(layer.kernel_size, plain.dilation, strict=True)]
        shape = (2, layer.in_channels, *(SIZE + r for r in reach))
    if weight.shape != plain.weight.shape:
        raise ConversionError(
            f"{name}: the weight of this {type(layer).__qualname__} has shape {tuple(weight.shape)}, a plain layer "
            f"takes {tuple(plain.weight.shape)}"
        )
    plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
    plain.bias = layer.bias
    plain.train(layer.training)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").to(weight)
    before, after = layer(x).float(), plain(x).float()
    is_same = before.shape == after.shape and bool((before - after).norm() <= RELATIVE_ERROR * before.norm())
    if not is_same:  # a NaN is never the same
        raise ConversionError(
            f"{name}: a {type(layer).__qualname__} computes something else than the product with the weight that is "
            "given for it: it stays as it is, in float"
        )
    return plain
