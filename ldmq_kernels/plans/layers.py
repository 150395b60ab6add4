"""The layers of a model that can be quantized: their names, kinds and shapes, and the hash of them all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def quantizable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear and every 2-D convolution of a model by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


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
