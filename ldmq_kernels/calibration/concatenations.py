"""Which layers read a concatenation of channels, and where its second part begins.

A UNet's decoder concatenates its own activations with those of a skip connection. The two parts differ in
range, so that one scale fits neither (Li et al., Q-Diffusion, arXiv 2302.04304, section 4.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ldmq_kernels.calibration.trajectory import UNetCall
from ldmq_kernels.plans.layers import layer_shape, quantizable_layers


class _Concatenations(TorchFunctionMode):
    """Notes, for each tensor made by a concatenation of two along the channels, the size of the first part."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[int, int] = {}
        self._kept: list[Tensor] = []  # an id is that of one tensor only as long as it lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat, torch.concatenate):
            tensors = args[0] if args else (kwargs or {})["tensors"]
            axis = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            if len(tensors) == 2 and axis in (1, -3) and result.dim() == 4:
                self.parts[id(result)] = tensors[0].shape[1]
                self._kept.append(result)
        return result


@torch.no_grad()
def concatenated_inputs(model: nn.Module, call: UNetCall) -> dict[str, int]:
    """Layer -> channels of the first part, for every convolution of a block whose input is a concatenation.

    Normalization and activation between the concatenation and the layer keep the channels' order, so all
    convolutions of the block with as many input channels are named.

    Args:
        call: of the model, which is run once.
    """
    layers = {n: m for n, m in quantizable_layers(model).items() if isinstance(m, nn.Conv2d)}
    mode = _Concatenations()
    first_parts: dict[str, int] = {}

    def look(name: str) -> Any:
        def before(_block: nn.Module, inputs: tuple[Any, ...]) -> None:
            tensors = [v for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)]
            first = next((mode.parts[id(v)] for v in tensors if id(v) in mode.parts), None)
            if first is None:
                return
            channels = next(v.shape[1] for v in tensors if id(v) in mode.parts)
            inside = [n for n in layers if n == name or n.startswith(f"{name}.")]
            first_parts.update({n: first for n in inside if layer_shape(layers[n])[1] == channels})

        return before

    handles = [module.register_forward_pre_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with mode:
            call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return first_parts
