"""The layers of a model that can be quantized: their names, kinds and shapes, and the hash of them all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ldmq_kernels.nn.kinds import CLASSES, FloatLayer, kind_of
from ldmq_kernels.numerics.formats import Scheme, no_groups

ADAPTED = "base_layer"  # what an adapter of PEFT calls the layer that it is on
FORMER_KINDS = ("linear", "conv2d")  # those that there were schemes for in plans of former releases


def modules_below_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by the names that they have without adapters, such as LoRA, in the model's order."""
    adapters: list[str] = []
    for name, module in model.named_modules():
        while adapters and not name.startswith(adapters[-1]):
            adapters.pop()
        if isinstance(module._modules.get(ADAPTED), nn.Module):
            adapters.append(f"{name}.")
        elif not adapters or name.removeprefix(adapters[-1]).split(".")[0] == ADAPTED:
            yield _without_adapters(name), module


def _without_adapters(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != ADAPTED)


def place_of(model: nn.Module, layer: str) -> str:
    """Where a layer of `quantizable_layers` is now: below its adapters, if there are any."""
    while isinstance(model.get_submodule(layer)._modules.get(ADAPTED), nn.Module):
        layer = f"{layer}.{ADAPTED}"
    return layer


def quantizable_layers(model: nn.Module) -> dict[str, FloatLayer]:
    """Every linear and convolution over 1, 2 or 3 axes of a model, in its order, by its name without adapters."""
    kinds = tuple(CLASSES.values())
    return {name: m for name, m in modules_below_adapters(model) if isinstance(m, kinds)}


def layer_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a call of a layer, as a hook gets the arguments: some models pass it by its name."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x


def layer_shape(layer: FloatLayer) -> tuple[int, ...]:
    """Shape of the float weight, whatever the layer holds now."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def refusal(layer: FloatLayer, scheme: Scheme) -> str:
    """Why a layer of this kind and shape cannot have a scheme, in words; "" where it can."""
    kind = kind_of(layer)
    if kind not in scheme.format.layers:
        return f"no {scheme} for a {kind}"
    _, channels, *kernel = layer_shape(layer)
    folds_time = kind == "conv3d" and kernel[0] > 1 and kernel[1:] != [1, 1]
    if folds_time and channels % scheme.format.weight.channel_groups:
        return no_groups(scheme, channels)
    if scheme.is_rotated and getattr(layer, "groups", 1) != 1:
        return f"{scheme} rotates channels, which a grouped convolution does not share: choose a dynamic scheme"
    return ""


def fingerprint(model: nn.Module, kinds: Sequence[str] = tuple(CLASSES)) -> str:
    """Hash of the names, kinds and shapes of all quantizable layers; the same before and after quantization.

    Args:
        kinds: which count; those of former releases give the hash that their plans have.
    """
    layers = {name: layer for name, layer in quantizable_layers(model).items() if kind_of(layer) in kinds}
    lines = [f"{name} {kind_of(m)} {layer_shape(m)}" for name, m in layers.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
