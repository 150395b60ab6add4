"""How many multiply-accumulates of a model's call run on 8-bit integers, of all that it makes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldmq_kernels.calibration.trajectory import UNetCall
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan


@torch.no_grad()
def share_in_8_bits(model: nn.Module, call: UNetCall, plan: Plan) -> float:
    """The share, 0 to 1, of a call's multiply-accumulates that a plan computes by int8 activations and weights.

    All products of matrices count, those inside attention too, which stay in float; a split activation counts once.

    Args:
        model: in float.
    """
    layers, made = quantizable_layers(model), Counter[str]()

    def count(name: str) -> Any:
        def hook(layer: nn.Module, _args: Any, output: Tensor) -> None:
            weight: Tensor = layer.weight  # type: ignore[assignment]
            made[name] += output.numel() * weight[0].numel()

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    in_8_bits = sum(
        made[name] for name, of_layer in plan.layers(model).items() if of_layer.scheme.quantizes_activations
    )
    return 2 * in_8_bits / counter.get_total_flops()
