"""Inputs of layers, and gradients by their outputs, while their model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.redrawn import frozen
from ldmq_kernels.nn.kinds import FloatLayer, watch_product
from ldmq_kernels.plans.layers import layer_input, quantizable_layers


@dataclass
class Ran:
    """One run of a layer within a call of its model.

    Attributes:
        gradients: (probes, *output.shape) float32; None until a probe gives one, as where the model's output does not
            depend on the layer's.
    """

    name: str
    x: Tensor
    output: Tensor
    gradients: Tensor | None = None


class Recorder:
    """Hooks that keep inputs and outputs of some layers during a call of the model.

    Attributes:
        ran: names of layers, a layer as often as it runs in the call, each with its input and output.
        outputs: theirs in the graph, where gradients by them are wanted.
    """

    def __init__(self, layers: Mapping[str, FloatLayer], gradients: bool) -> None:
        self.ran: list[tuple[str, Tensor, Tensor]] = []
        self.outputs: list[Tensor] = []
        self._gradients = gradients
        self._handles = [watch_product(layer, self._hook(name)) for name, layer in layers.items()]

    def _hook(self, name: str) -> Any:
        def keep(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            self.ran.append((name, layer_input(args, kwargs).detach(), output.detach()))
            if not self._gradients:
                return None
            if not output.requires_grad:  # none of the layers recorded comes before it: the graph begins here
                output = output.detach().requires_grad_().clone()
            self.outputs.append(output)
            return output

        return keep

    def taken(self) -> tuple[list[Ran], list[Tensor]]:
        """What ran since, without gradients yet, and its outputs; both are forgotten here."""
        ran = [Ran(*found) for found in self.ran]
        outputs, self.ran, self.outputs = self.outputs, [], []
        return ran, outputs

    def close(self) -> None:
        """End the hooks."""
        for handle in self._handles:
            handle.remove()


@contextlib.contextmanager
def recording(model: nn.Module, layers: Sequence[str], gradients: bool) -> Iterator[Recorder]:
    """Record some layers of a model, whose parameters take no gradients meanwhile, inside this block."""
    modules = quantizable_layers(model)
    recorder = Recorder({name: modules[name] for name in layers}, gradients)
    try:
        with frozen(model):
            yield recorder
    finally:
        recorder.close()


def give(ran: Sequence[Ran], gradients: Sequence[Tensor | None], probe: int, probes: int, size: float = 1.0) -> None:
    """Put a probe's gradients to what ran, in float32; where the model's output does not depend on a layer is none.

    Args:
        probe: its number, of so many `probes`.
        size: what the probe was divided by.
    """
    for found, gradient in zip(ran, gradients, strict=True):
        if gradient is None:
            continue
        if found.gradients is None:
            found.gradients = torch.empty((probes, *gradient.shape), dtype=torch.float32, device=gradient.device)
        torch.mul(gradient, size, out=found.gradients[probe])
