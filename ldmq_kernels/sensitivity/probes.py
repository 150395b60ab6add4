"""The inputs of each layer in a replay of the float trajectory, and the effect of its noise on the UNet's output.

A small error d of a layer's output moves the UNet's output by J d, J being the Jacobian between the two. For a
random v with independent entries of variance 1, the mean of (v . J d)^2 is |J d|^2, and v . J d = (J^T v) . d:
one backward pass from v gives the weight of every element of every layer's output at once. So the noise of any
number of trials at the UNet's output is estimated from the layer's own inputs, without running the UNet again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall, folds_of_rows
from ldmq_kernels.chunks import chunks_within
from ldmq_kernels.plans.layers import layer_input, quantizable_layers

MEMORY = 4 << 30  # bytes of inputs and gradients that are kept at a time
PROBES = 2


@dataclass
class LayerRecord:
    """The record of one call of one layer.

    Attributes:
        step: the sampling step of the call.
        x: the layer's input.
        gradients: J^T v for each probe, of the output's shape and float32; empty where there were no probes.
        signal: sum of squares of the UNet's output, over the batch.
        fold: 0 or 1: which half of the samples this is, where what is fitted on one is judged on the other.
        rows: the fold of each row, by its prompt; empty where that is not known.
        call: the number of the model's call; a layer that runs several times in one has a record of each.
    """

    step: int
    x: Tensor
    signal: float
    gradients: list[Tensor] = field(default_factory=list)
    fold: int = 0
    rows: tuple[int, ...] = ()
    call: int = 0

    def folds(self) -> list[LayerRecord]:
        """The samples of each fold; every second one where their prompts are not known."""
        of_rows = self.rows or tuple(row % 2 for row in range(self.x.shape[0]))
        halves = []
        for fold in sorted(set(of_rows)):
            mask = torch.tensor([row == fold for row in of_rows], device=self.x.device)
            share = of_rows.count(fold) / len(of_rows)
            gradients = [g[mask] for g in self.gradients]
            halves.append(LayerRecord(self.step, self.x[mask], self.signal * share, gradients, fold, call=self.call))
        return halves


def _rademacher(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)


class _Recorder:
    """Hooks that keep inputs, and the gradients of outputs, of some layers during a call."""

    def __init__(self, layers: dict[str, nn.Linear | nn.Conv2d], probes: int) -> None:
        self.inputs: list[tuple[str, Tensor]] = []  # a layer may run several times in a call
        self.outputs: list[Tensor] = []
        self._probes = probes
        self._handles = [
            layer.register_forward_hook(self._hook(name), with_kwargs=True) for name, layer in layers.items()
        ]

    def _hook(self, name: str) -> Any:
        def keep(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            self.inputs.append((name, layer_input(args, kwargs).detach()))
            if not self._probes:
                return None
            if not output.requires_grad:  # none of the layers recorded comes before it: the graph begins here
                output = output.detach().requires_grad_().clone()
            self.outputs.append(output)
            return output

        return keep

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _call(
    model: nn.Module, call: UNetCall, recorder: _Recorder, probes: int, index: int, prompts: tuple[int, ...]
) -> list[tuple[str, LayerRecord]]:
    with torch.set_grad_enabled(probes > 0):
        output = call.run(model)
        signal = float(output.detach().double().square().sum())
        batch = output.shape[0]
        records = [
            (name, LayerRecord(call.step, x, signal, rows=folds_of_rows(x.shape[0], prompts, batch), call=index))
            for name, x in recorder.inputs
        ]
        for probe in range(probes if recorder.outputs else 0):
            gradients = torch.autograd.grad(
                output,
                recorder.outputs,
                _rademacher(output.detach(), 1000 * index + probe),
                retain_graph=probe + 1 < probes,
                allow_unused=True,
            )
            for (_, layer_record), gradient in zip(records, gradients, strict=True):
                if gradient is not None:
                    layer_record.gradients.append(gradient.float())
    recorder.inputs.clear()
    recorder.outputs.clear()
    return records


def record(
    model: nn.Module, trajectory: Trajectory, layers: Sequence[str], probes: int = PROBES
) -> dict[str, list[LayerRecord]]:
    """Replay the trajectory in float and record these layers, call by call.

    Args:
        probes: backward passes for each call; 0 records inputs alone.

    Returns:
        layer -> one record a call, or several of a layer that runs several times in one. A layer whose output does not
        reach the UNet's has no gradients.
    """
    modules = quantizable_layers(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    records: dict[str, list[LayerRecord]] = {name: [] for name in layers}
    recorder = _Recorder({name: modules[name] for name in layers}, probes)
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for index, call in enumerate(trajectory.calls):
            prompts = call.prompts if len(trajectory.prompts) > 1 else ()
            for name, layer_record in _call(model, call, recorder, probes, index, prompts):
                records[name].append(layer_record)
    finally:
        recorder.close()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return records


def chunks_of_layers(
    model: nn.Module, trajectory: Trajectory, layers: Sequence[str], probes: int = PROBES
) -> Iterator[list[str]]:
    """Cut the layers into runs whose records fit the memory; a layer that alone is larger gets its own."""
    sizes: dict[str, int] = dict.fromkeys(layers, 0)
    modules = quantizable_layers(model)

    def note(name: str) -> Any:
        def size(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = layer_input(args, kwargs)
            sizes[name] += x.numel() * x.element_size() + 4 * probes * output.numel()

        return size

    handles = [modules[name].register_forward_hook(note(name), with_kwargs=True) for name in layers]
    try:
        with torch.no_grad():
            trajectory.calls[0].run(model)
    finally:
        for handle in handles:
            handle.remove()
    calls = len(trajectory.calls)
    return chunks_within(layers, {name: size * calls for name, size in sizes.items()}, MEMORY)
