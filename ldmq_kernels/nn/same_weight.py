"""One quantized weight under several ways to scale the activations: what a search tries one after the other."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor

from ldmq_kernels.nn.quantized import QuantizedLayer
from ldmq_kernels.numerics.formats import Scheme

Layer = TypeVar("Layer", bound=QuantizedLayer)


def with_activations(
    layer: Layer, scheme: Scheme, *, input_scale: Tensor | None = None, first_token: bool = False
) -> Layer:
    """The same layer with its activations scaled in another way; both hold one weight, which is not rounded again.

    Args:
        layer: dynamic, of 8-bit activations, with the smoothing that is wanted.
        scheme: of the same format.

    See `QuantizedLayer.from_float` for the others.

    Raises:
        ValueError: the layer is not dynamic or computes its first token apart, or the scheme is of another format.
    """
    if layer.scheme.activations != "dynamic" or layer.first_token:
        raise ValueError(f"a plain dynamic layer can be given other activations, this is {layer.scheme}")
    if scheme.format != layer.scheme.format:
        raise ValueError(f"{scheme} has another weight than {layer.scheme}: quantize the float layer")
    twin = copy.copy(layer)
    twin._buffers, twin._parameters = dict(layer._buffers), dict(layer._parameters)
    twin._non_persistent_buffers_set = set(layer._non_persistent_buffers_set)
    twin.scheme, twin.first_token = scheme, first_token
    twin._buffers["input_scale"] = None if input_scale is None else input_scale.detach().float().reshape(-1)
    twin._derive_for_call()
    if first_token and twin.packed_weight is not None:
        twin.first_token_weight = layer.weight
    return twin
