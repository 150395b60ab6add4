"""What the nodes read of a file with this package's own layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.integrations.comfyui.export import MARK, OWN
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.numerics.formats.registry import scheme_of


def settings_of(metadata: Mapping[str, str] | None, name: str) -> dict[str, Any]:
    """What a file's metadata says of the model.

    Raises:
        ValueError: it is not a file of `ldmq export --comfyui --own-layers`.
    """
    said: dict[str, Any] = json.loads((metadata or {}).get(MARK, "{}"))
    if said.get("own_layers") is not True:
        raise ValueError(
            f"{name} holds no layers of ldmq_kernels: write it with `ldmq export MODEL --comfyui --own-layers`, or "
            "take ComfyUI's own loader"
        )
    return said


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of the float weights that quantized layers stand for, by the weights' names."""
    return {
        name.removesuffix(OWN) + "weight": tuple(_said(tensor)["shape"])
        for name, tensor in tensors.items()
        if name.endswith(f".{OWN}")
    }


def read_layer(kind: type[QuantizedLayer], like: nn.Module, tensors: dict[str, Tensor], prefix: str) -> Any:
    """The quantized layer of a name, whose tensors are taken out of the file's; None where it is a float one.

    Args:
        kind: of the layer.
        like: a float layer of its shape.
        prefix: its name and a dot.

    Raises:
        ValueError: a tensor of the layer is missing, or is not what its scheme stores.
    """
    said = tensors.pop(f"{prefix}{OWN}", None)
    if said is None:
        return None
    entries = _said(said)
    scheme = scheme_of(entries["scheme"])
    layer = kind.empty(
        like,
        scheme,
        smoothed=entries["smoothed"],
        timestep_groups=entries["timestep_groups"],
        first_token=entries["first_token"],
        corrected=entries["corrected"],
    )
    tensors.pop(f"{prefix}weight", None)
    for name, buffer in layer.stored_tensors().items():
        stored = tensors.pop(f"{prefix}{OWN}.{name}", None)
        if stored is None or stored.shape != buffer.shape:
            found = "nothing" if stored is None else tuple(stored.shape)
            raise ValueError(
                f"{prefix}{name} must be {tuple(buffer.shape)}, and the file has {found}: export the model again"
            )
        scheme.check(name, stored)
        layer.fill(name, stored)
    bias = tensors.pop(f"{prefix}bias", None)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    layer.name = prefix[:-1]
    layer.eval().finish()
    return layer


def _said(tensor: Tensor) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(tensor.to(torch.uint8).numpy().tobytes())
    return said
