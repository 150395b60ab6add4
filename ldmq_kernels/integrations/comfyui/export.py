"""One safetensors file of a quantized UNet under the original names, for ComfyUI.

ComfyUI's own int8 layers, "int8_tensorwise", are linears: `weight` int8 (N, K), `weight_scale` float32 (N, 1), and
`comfy_quant`, bytes of JSON that name the format. Inputs are scaled token by token in each call. All that they cannot
compute is written in floating point, with the values that the integers stand for.

For this package's nodes a layer is written as it is, as `ldmq.NAME`, with what it is as bytes of JSON in `ldmq`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ldmq_kernels.integrations.comfyui.names import ldm_names
from ldmq_kernels.nn import QuantizedLayer, QuantLinear
from ldmq_kernels.nn.timestep_groups import attached
from ldmq_kernels.numerics.formats.int8 import INT8_WEIGHT

MARK = "ldmq_comfyui"  # in the metadata of the files
PREFIX = "model.diffusion_model."
OWN = "ldmq"
# model channels, width of the text, width of what is added to the time embedding
KNOWN = {
    "Stable Diffusion 1.x": (320, 768, None),
    "Stable Diffusion 2.x": (320, 1024, None),
    "Stable Diffusion XL": (320, 2048, 2816),
}
INT8 = "int8, as ComfyUI computes it"
INT8_WEIGHTS = "int8 weights alone"
FLOAT_FORMAT = "floating point: no format of ComfyUI's"
FLOAT_SMOOTHED = "floating point: smoothed"
FLOAT_ROTATED = "floating point: rotated"
FLOAT_CONVOLUTION = "floating point: convolutions"
OWN_LAYERS = "this package's layers"


@dataclass
class Exported:
    """A file's content, and how many quantized layers went into it in which way.

    Attributes:
        content: the safetensors file.
        layers: how many layers by what became of them.
    """

    content: bytes
    layers: Counter[str] = field(default_factory=Counter)


def check_known(config: Any) -> None:
    """Refuse a UNet that ComfyUI would not recognise, which it does by the shapes of its tensors.

    Args:
        config: of the UNet.

    Raises:
        ValueError: it is not that of Stable Diffusion 1.x, 2.x or XL.
    """
    shape = (
        config["block_out_channels"][0],
        config["cross_attention_dim"],
        config["projection_class_embeddings_input_dim"],
    )
    if shape not in KNOWN.values():
        accepted = "; ".join(f"{name} {numbers}" for name, numbers in KNOWN.items())
        raise ValueError(
            f"ComfyUI knows UNets by their shapes, and none of {shape} (channels, text width, added width): it takes "
            f"{accepted}"
        )


def export(unet: Any, *, own_layers: bool = False) -> Exported:
    """The file of a quantized UNet.

    Args:
        unet: a quantized `UNet2DConditionModel`; its floating-point layers are written in their dtype.
        own_layers: for this package's nodes, all layers as they are; else for ComfyUI's own int8 linears.

    Raises:
        ValueError: nothing is quantized, or the UNet has a layer that ComfyUI has not.
    """
    if not any(isinstance(module, QuantizedLayer) and module.scheme.quantizes for module in unet.modules()):
        raise ValueError("nothing of this UNet is quantized: quantize it with `ldmq quantize`, and export that")
    tensors: dict[str, Tensor] = {}
    layers: Counter[str] = Counter()
    for name, original in ldm_names(unet).items():
        module = unet.get_submodule(name)
        if isinstance(module, QuantizedLayer) and module.scheme.quantizes:
            stored, what = (_own(module), OWN_LAYERS) if own_layers else _for_comfyui(module)
            layers[what] += 1
        else:
            stored = module._parameters
        tensors |= {f"{PREFIX}{original}.{key}": _plain(value) for key, value in stored.items() if value is not None}
    groups = attached(unet)
    said = {"own_layers": own_layers, "timestep_groups": [] if groups is None else list(groups.boundaries)}
    # one entry: those of several come in a random order, and the same model is the same file
    return Exported(save(tensors, {MARK: json.dumps(said)}), layers)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor).cpu().contiguous().clone()  # views of one tensor become several


def _said(what: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(what).encode()), dtype=torch.uint8, device="cpu")


def _for_comfyui(layer: Any) -> tuple[dict[str, Tensor | None], str]:
    """A layer's tensors for ComfyUI's own layers, and what became of it."""
    as_float = {"weight": layer.weight, "bias": layer.bias}
    if not isinstance(layer, QuantLinear):
        return as_float, FLOAT_CONVOLUTION
    if layer.scheme.format.weight is not INT8_WEIGHT:
        return as_float, FLOAT_FORMAT
    if layer.smoothing is not None:  # the int8 layers of ComfyUI read no `pre_quant_scale`
        return as_float, FLOAT_SMOOTHED
    if layer.scheme.is_rotated:
        return as_float, FLOAT_ROTATED
    is_integer = layer.scheme.takes_quantized
    said: dict[str, Any] = {"format": "int8_tensorwise"}
    if not is_integer:
        said["full_precision_matrix_mult"] = True
    stored = layer.stored_tensors()
    tensors = {
        "weight": stored["weight"],
        "weight_scale": stored["weight_scale"].reshape(-1, 1),
        "comfy_quant": _said(said),
        "bias": layer.bias,
    }
    return tensors, INT8 if is_integer else INT8_WEIGHTS


def _own(layer: Any) -> dict[str, Tensor | None]:
    """A layer's tensors for this package's nodes."""
    scales = layer.input_scale
    said = {
        "scheme": str(layer.scheme),
        "shape": list(layer.weight.shape),
        "smoothed": layer.smoothing is not None,
        "timestep_groups": 1 if scales is None else scales.numel(),
        "first_token": layer.first_token,
        "corrected": layer.adds_bias,
    }
    stored = {f"{OWN}.{name}": tensor for name, tensor in layer.stored_tensors().items()}
    return {**stored, OWN: _said(said), "bias": layer.bias}


def is_exported(metadata: dict[str, str] | None) -> bool:
    """Whether a safetensors file with this metadata was written here."""
    return MARK in (metadata or {})
