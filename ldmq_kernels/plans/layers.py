"""The layers of a model that can be quantized: their names, kinds and shapes, and the hash of them all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

ADAPTED = "base_layer"  # what an adapter of PEFT calls the layer that it is on


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


def quantizable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear and every 2-D convolution of a model, in its order, by its name in the model without adapters."""
    return {name: m for name, m in modules_below_adapters(model) if isinstance(m, nn.Linear | nn.Conv2d)}


def kind_of(layer: nn.Module) -> str:
    """ "linear" or "conv2d"."""
    return "linear" if isinstance(layer, nn.Linear) else "conv2d"


def layer_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a call of a layer, as a hook gets the arguments: some models pass it by its name."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x


def layer_shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """Shape of the float weight, whatever the layer holds now."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def fingerprint(model: nn.Module) -> str:
    """Hash of the names, kinds and shapes of all quantizable layers; the same before and after quantization."""
    lines = [f"{name} {kind_of(m)} {layer_shape(m)}" for name, m in quantizable_layers(model).items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
