"""The rotation of a weight, by the fastest code for its device; all of them give the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.backend import backends
from ldmq_kernels.numerics import hadamard


def rotated_weight(weight: Tensor) -> Tensor:
    """W H' / size of a weight (..., C) float32, whose product with a rotated input is the layer's."""
    if weight.device.type != "cpu":
        return hadamard.rotated_weight(weight)
    turned: Tensor = backends()["cpu"].rotated(weight)
    return torch.mul(turned, 1 / hadamard.block_size(weight.shape[-1]), out=turned)
