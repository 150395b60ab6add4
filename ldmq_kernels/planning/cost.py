"""What a choice costs: bytes in a checkpoint, and operations where no times were measured."""

from __future__ import annotations

from torch import nn

from ldmq_kernels.numerics.affine import group_count
from ldmq_kernels.numerics.formats import Scheme
from ldmq_kernels.planning.plan import layer_shape

FLOAT_BYTES = 2
# Cost of a multiply-accumulate relative to int8 with a static scale. 16-bit ones run at half the rate
# of int8 on tensor cores and on AMX; a dynamic scale adds a pass over the activations.
OPERATION_COST = {"w8a8-static": 1.0, "w8a8-dynamic": 1.1, "w4a8-static": 1.0, "w4a8-dynamic": 1.1}
FLOAT_OPERATION_COST = 2.0
WEIGHT_ONLY_OPERATION_COST = 2.1


def weight_bytes(layer: nn.Linear | nn.Conv2d, scheme: Scheme, *, smoothed: bool = False) -> int:
    """Bytes of a layer's weight in a checkpoint, with its scales; the bias is the same in all schemes."""
    shape = layer_shape(layer)
    rows, channels = shape[0], shape[1]
    positions = 1
    for size in shape[2:]:
        positions *= size
    if not scheme.quantizes:
        return FLOAT_BYTES * rows * channels * positions
    groups = rows * positions * group_count(channels)
    if scheme.format.weight_bits == 8:
        total = rows * channels * positions + 4 * rows
    elif scheme.format.activation_bits == 8:
        total = rows * positions * -(-channels // 2) + groups + 4 * rows
    else:
        total = rows * positions * -(-channels // 2) + 4 * groups
    return total + (4 if scheme.is_static else 0) + (4 * channels if smoothed else 0)


def operation_cost(operations: int, scheme: Scheme) -> float:
    """Multiply-accumulates of a layer, weighted by how dear the scheme makes them."""
    if not scheme.quantizes:
        return operations * FLOAT_OPERATION_COST
    return operations * OPERATION_COST.get(str(scheme), WEIGHT_ONLY_OPERATION_COST)
