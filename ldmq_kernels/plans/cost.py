"""What a plan costs: bytes in a checkpoint, operations where no times are known, and the time of a call in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.nn.kinds import FloatLayer
from ldmq_kernels.numerics.formats import FLOAT, FLOAT_BYTES, Scheme
from ldmq_kernels.plans.layers import layer_shape, quantizable_layers, refusal
from ldmq_kernels.plans.plan import LayerPlan


def layer_bytes(layer: FloatLayer, layer_plan: LayerPlan) -> int:
    """Bytes that a layer takes in a checkpoint as a plan has it, beside the bias of the float layer.

    Args:
        layer: float, or quantized by the plan already.
    """
    has_bias = layer.bias is not None and not (isinstance(layer, QuantizedLayer) and layer.adds_bias)
    return weight_bytes(
        layer,
        layer_plan.scheme,
        smoothed=layer_plan.smoothing is not None,
        timestep_groups=len(layer_plan.scales),
        adds_bias=layer_plan.bias_correction is not None and not has_bias,
    )


def weight_bytes(
    layer: FloatLayer,
    scheme: Scheme,
    *,
    smoothed: bool = False,
    timestep_groups: int = 1,
    adds_bias: bool = False,
) -> int:
    """Bytes of a layer's weight in a checkpoint, with its scales and corrections; a bias is of 16 bit.

    A bias that the float layer has is the same in all schemes, and not counted.
    """
    out, channels, *kernel = layer_shape(layer)
    size = scheme.bytes((out, *kernel, channels), smoothed=smoothed, timestep_groups=timestep_groups)
    return size + (FLOAT_BYTES * out if adds_bias and scheme.quantizes else 0)


def least_bytes(model: nn.Module, schemes: Sequence[Scheme]) -> int:
    """The fewest bytes that the weights of a model's layers take by any of the schemes, without corrections."""
    total = 0
    for layer in quantizable_layers(model).values():
        sizes = [weight_bytes(layer, scheme) for scheme in schemes if not refusal(layer, scheme)]
        total += min(sizes, default=weight_bytes(layer, FLOAT))
    return total


def operation_cost(operations: int, scheme: Scheme) -> float:
    """Multiply-accumulates of a layer, weighted by how dear the scheme makes them."""
    return operations * scheme.operation_cost


def time_in_words(measured: Mapping[str, Any]) -> str:
    """The time of a call as a plan's `measured` has it, and whether it was predicted; empty where it has none."""
    if "predicted_milliseconds" in measured:
        quantized, floating = measured["predicted_milliseconds"], measured["predicted_milliseconds_float"]
        device = measured.get("predicted_for", "another device")
        return (
            f"one UNet call about {quantized:.2f} ms, float {floating:.2f} ms, predicted for {device} and not measured"
        )
    if "milliseconds" in measured:
        return f"one UNet call about {measured['milliseconds']:.2f} ms, float {measured['milliseconds_float']:.2f} ms"
    return ""
