"""What a choice costs: bytes in a checkpoint, and operations where no times were measured."""

from __future__ import annotations

import math

from torch import nn

from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.numerics.affine import group_count
from ldmq_kernels.numerics.formats import Scheme
from ldmq_kernels.plans.layers import layer_shape
from ldmq_kernels.plans.plan import LayerPlan

FLOAT_BYTES = 2
# Cost of a multiply-accumulate relative to int8 with a static scale. 16-bit ones run at half the rate
# of int8 on tensor cores and on AMX; a dynamic scale adds a pass over the activations.
OPERATION_COST = {
    "static": 1.0,
    "timestep": 1.0,
    "dynamic": 1.1,
    "split": 2.2,
}  # by where the activation scale comes from
FLOAT_OPERATION_COST = 2.0
WEIGHT_ONLY_OPERATION_COST = 2.1


def choice_bytes(layer: nn.Linear | nn.Conv2d, choice: LayerPlan) -> int:
    """Bytes that a layer takes in a checkpoint as a plan has it, beside the bias of the float layer.

    Args:
        layer: float, or quantized by the plan already.
    """
    has_bias = layer.bias is not None and not (isinstance(layer, QuantizedLayer) and layer.adds_bias)
    return weight_bytes(
        layer,
        choice.scheme,
        smoothed=choice.smoothing is not None,
        timestep_groups=len(choice.scales),
        adds_bias=choice.bias_correction is not None and not has_bias,
    )


def weight_bytes(
    layer: nn.Linear | nn.Conv2d,
    scheme: Scheme,
    *,
    smoothed: bool = False,
    timestep_groups: int = 1,
    adds_bias: bool = False,
) -> int:
    """Bytes of a layer's weight in a checkpoint, with its scales and corrections; a bias is of 16 bit.

    A bias that the float layer has is the same in all schemes, and not counted.
    """
    shape = layer_shape(layer)
    rows, channels = shape[0], shape[1]
    positions = math.prod(shape[2:])
    if not scheme.quantizes:
        return FLOAT_BYTES * rows * channels * positions
    groups = rows * positions * group_count(channels)
    if scheme.format.weight_bits == 8:
        total = rows * channels * positions + 4 * rows
    elif scheme.format.activation_bits == 8:
        total = rows * positions * -(-channels // 2) + groups + 4 * rows
    else:
        total = rows * positions * -(-channels // 2) + 4 * groups
    if scheme.is_static:
        total += 4 * (timestep_groups if scheme.has_timestep_scales else 1)
    if smoothed and scheme.format.activation_bits == 8:
        total += 4 * channels
    return total + (FLOAT_BYTES * rows if adds_bias else 0)


def operation_cost(operations: int, scheme: Scheme) -> float:
    """Multiply-accumulates of a layer, weighted by how dear the scheme makes them."""
    if not scheme.quantizes:
        return operations * FLOAT_OPERATION_COST
    return operations * OPERATION_COST.get(scheme.activations or "", WEIGHT_ONLY_OPERATION_COST)
