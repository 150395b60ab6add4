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

from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall, folds_of_rows, output_tensor
from ldmq_kernels.chunks import chunks_within
from ldmq_kernels.plans.layers import quantizable_layers

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
    """

    step: int
    x: Tensor
    signal: float
    gradients: list[Tensor] = field(default_factory=list)
    fold: int = 0
    rows: tuple[int, ...] = ()

    def folds(self) -> list[LayerRecord]:
        """The samples of each fold; every second one where their prompts are not known."""
        of_rows = self.rows or tuple(row % 2 for row in range(self.x.shape[0]))
        halves = []
        for fold in sorted(set(of_rows)):
            mask = torch.tensor([row == fold for row in of_rows], device=self.x.device)
            share = of_rows.count(fold) / len(of_rows)
            halves.append(
                LayerRecord(self.step, self.x[mask], self.signal * share, [g[mask] for g in self.gradients], fold)
            )
        return halves


def _rademacher(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)


class _Recorder:
    """Hooks that keep inputs, and the gradients of outputs, of some layers during a call."""

    def __init__(self, layers: dict[str, nn.Linear | nn.Conv2d], probes: int) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._probes = probes
        self._handles = [layer.register_forward_hook(self._hook(name)) for name, layer in layers.items()]

    def _hook(self, name: str) -> Any:
        def keep(_layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if name in self.inputs:
                raise ValueError(f"{name} is called twice in one call of the model, which has no name for both")
            self.inputs[name] = args[0].detach()
            if not self._probes:
                return None
            if not output.requires_grad:  # none of the layers recorded comes before it: the graph begins here
                output = output.detach().requires_grad_().clone()
            self.outputs[name] = output
            return output

        return keep

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _call(
    model: nn.Module, call: UNetCall, recorder: _Recorder, probes: int, seed: int, prompts: tuple[int, ...]
) -> dict[str, LayerRecord]:
    with torch.set_grad_enabled(probes > 0):
        output = output_tensor(model(*call.args, **call.kwargs))
        signal = float(output.detach().double().square().sum())
        records = {
            name: LayerRecord(call.step, x, signal, rows=folds_of_rows(x.shape[0], prompts))
            for name, x in recorder.inputs.items()
        }
        names = list(recorder.outputs)
        for probe in range(probes if names else 0):
            gradients = torch.autograd.grad(
                output,
                [recorder.outputs[name] for name in names],
                _rademacher(output.detach(), seed + probe),
                retain_graph=probe + 1 < probes,
                allow_unused=True,
            )
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    records[name].gradients.append(gradient.float())
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
        layer -> one record a call. A layer whose output does not reach the UNet's has no gradients.
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
            for name, layer_record in _call(model, call, recorder, probes, 1000 * index, prompts).items():
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
    first = Trajectory(trajectory.calls[:1], trajectory.latents, trajectory.steps)
    sizes: dict[str, int] = {}
    modules = quantizable_layers(model)

    def note(name: str) -> Any:
        def size(_layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            sizes[name] = args[0].numel() * args[0].element_size() + 4 * probes * output.numel()

        return size

    handles = [modules[name].register_forward_hook(note(name)) for name in layers]
    try:
        with torch.no_grad():
            for call in first.calls:
                model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    calls = len(trajectory.calls)
    return chunks_within(layers, {name: size * calls for name, size in sizes.items()}, MEMORY)
