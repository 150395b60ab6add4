"""Layers that multiply the same input, computed as one product: q, k and v of an attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels import ops
from ldmq_kernels.integrations.diffusers.fused.eligibility import takes_quantized
from ldmq_kernels.nn import QuantLinear


class MergedLinears:
    """One product for several QuantLinears, exact: the columns of the whole are those of the parts.

    The weights are not held twice: the layers' buffers become views of the whole. What is merged is valid
    until one of the layers is filled, loaded or moved.

    Args:
        layers: those of which `whole_weight` made one.
        weight: what it made.
    """

    def __init__(self, layers: Sequence[QuantLinear], weight: Tensor) -> None:
        self.layers = tuple(layers)
        self.operands = [torch.cat(parts) for parts in zip(*(layer.operands() for layer in layers), strict=True)]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = torch.cat([bias.detach() for bias in biases]) if biases else None
        self.widths = [layer.out_features for layer in layers]
        self.weight = weight
        parts = weight.split([len(layer.kernel_weight(True)) for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            layer.hold_part(part)
        self._revisions = [layer.revision for layer in layers]

    def is_valid(self, layers: Sequence[Any]) -> bool:
        """Whether these are the merged layers, as they were merged."""
        return all(a is b for a, b in zip(self.layers, layers, strict=True)) and self._revisions == [
            layer.revision for layer in self.layers
        ]

    def products(self, x_q: Tensor, x_scale: Tensor | None, out_dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The layers' outputs for a quantized input, views of one tensor."""
        first = self.layers[0]
        scale = first.call_scale if first.scheme.is_static else x_scale
        product = getattr(ops, first.scheme.format.products["linear"])
        out = product(x_q, scale, self.weight, *self.operands, self.bias, None, out_dtype)
        return out.split(self.widths, dim=-1)


def share_quantization(layers: Sequence[Any]) -> bool:
    """Whether all layers would make the same integers of the same input; reads scales, so not for a hot path."""
    if not all(type(layer) is QuantLinear and takes_quantized(layer) and not _is_empty(layer) for layer in layers):
        return False
    first = layers[0]
    return all(
        layer.scheme.activations is first.scheme.activations
        and _equal(layer.input_scale, first.input_scale)
        and _equal(layer.smoothing, first.smoothing)
        for layer in layers[1:]
    )


def whole_weight(layers: Sequence[QuantLinear]) -> Tensor | None:
    """The weights of layers that share their quantization as one, in their order: plain, or packed as they are.

    Returns:
        None where they cannot be one product: weights of another format, or packed so that they cannot be joined.
    """
    if len({str(layer.scheme) for layer in layers}) > 1 or len({layer.bias is None for layer in layers}) > 1:
        return None
    packed = [layer.packed_weight for layer in layers]
    if all(weight is None for weight in packed):
        return torch.cat([layer.plain_weight for layer in layers])
    held, packer = [weight for weight in packed if weight is not None], layers[0].packer
    if packer is None or packer.join is None or len(held) < len(layers):
        return None
    return packer.join(held, [layer.out_features for layer in layers])


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(torch.equal(a, b))


def _is_empty(layer: QuantLinear) -> bool:
    return any(tensor.is_meta for tensor in layer.operands())
