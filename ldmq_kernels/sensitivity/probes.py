"""The inputs of each layer in a replay of the float trajectory, and the effect of its noise on the UNet's output.

A small error d of a layer's output moves the UNet's output by J d, J being the Jacobian between the two. For a
random v with independent entries of variance 1, the mean of (v . J d)^2 is |J d|^2, and v . J d = (J^T v) . d:
one backward pass from v gives the weight of every element of every layer's output at once. So the noise of any
number of trials at the UNet's output is estimated from the layer's own inputs, without running the UNet again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall, folds_of_rows, prompts_of_rows
from ldmq_kernels.chunks import chunks_within
from ldmq_kernels.nn.kinds import FloatLayer, watch_product
from ldmq_kernels.plans.layers import layer_input, quantizable_layers
from ldmq_kernels.sensitivity.adjoint import CallWeights, EndTrajectory, frozen, rademacher

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


@dataclass
class EndRecord:
    """The record of one call of one layer for some pictures.

    Attributes:
        step: the sampling step of the call.
        weights: for how many calls this one stands.
        x: the layer's input.
        gradients: for each probe the weight of each value of the layer's output at the end, float32; empty where the
            output does not reach the model's.
        prompts: the prompt of each row; empty where rows are no pictures', such as a time embedding's for all.
        fold: 0 or 1: the half of the prompts that this is.
    """

    step: int
    weights: CallWeights
    x: Tensor
    gradients: list[Tensor]
    prompts: tuple[int, ...]
    fold: int = 0

    def folds(self) -> list[EndRecord]:
        """The rows of each fold; all of them as fold 0 where they are no pictures'."""
        found = []
        for fold in sorted({prompt % 2 for prompt in self.prompts}):
            rows = [row for row, prompt in enumerate(self.prompts) if prompt % 2 == fold]
            prompts, index = tuple(self.prompts[row] for row in rows), torch.tensor(rows, device=self.x.device)
            gradients = [g[index] for g in self.gradients]
            found.append(replace(self, x=self.x[index], gradients=gradients, prompts=prompts, fold=fold))
        return found or [self]


class _Recorder:
    """Hooks that keep inputs, and the gradients of outputs, of some layers during a call."""

    def __init__(self, layers: dict[str, FloatLayer], probes: int) -> None:
        self.inputs: list[tuple[str, Tensor]] = []  # a layer may run several times in a call
        self.outputs: list[Tensor] = []
        self.probes = probes
        self._handles = [watch_product(layer, self._hook(name)) for name, layer in layers.items()]

    def _hook(self, name: str) -> Any:
        def keep(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            self.inputs.append((name, layer_input(args, kwargs).detach()))
            if not self.probes:
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
    model: nn.Module, call: UNetCall, recorder: _Recorder, vectors: Sequence[Tensor]
) -> tuple[list[tuple[str, Tensor, list[Tensor]]], Tensor]:
    """What ran of the recorded layers in one call, each with its input and gradients, and the model's output.

    Args:
        vectors: what the output is multiplied with before the gradients; each is a backward pass.
    """
    with torch.set_grad_enabled(recorder.probes > 0):
        output = call.run(model)
        ran: list[tuple[str, Tensor, list[Tensor]]] = [(name, x, []) for name, x in recorder.inputs]
        for probe, vector in enumerate(vectors if recorder.outputs else ()):
            found = torch.autograd.grad(
                output,
                recorder.outputs,
                vector.to(output.dtype),
                retain_graph=probe + 1 < len(vectors),
                allow_unused=True,
            )
            for (_, _, gradients), gradient in zip(ran, found, strict=True):
                if gradient is not None:
                    gradients.append(gradient.float())
    recorder.inputs.clear()
    recorder.outputs.clear()
    return ran, output.detach()


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
    records: dict[str, list[LayerRecord]] = {name: [] for name in layers}
    with _recording(model, layers, probes) as recorder:
        for index, call in enumerate(trajectory.calls):
            prompts = call.prompts if len(trajectory.prompts) > 1 else ()
            vectors = [rademacher(call.output, 1000 * index + probe) for probe in range(probes)]
            ran, output = _call(model, call, recorder, vectors)
            signal = float(output.double().square().sum())
            for name, x, gradients in ran:
                rows = folds_of_rows(x.shape[0], prompts, output.shape[0])
                records[name].append(LayerRecord(call.step, x, signal, gradients, rows=rows, call=index))
    return records


@contextlib.contextmanager
def _recording(model: nn.Module, layers: Sequence[str], probes: int) -> Iterator[_Recorder]:
    modules = quantizable_layers(model)
    recorder = _Recorder({name: modules[name] for name in layers}, probes)
    try:
        with frozen(model):
            yield recorder
    finally:
        recorder.close()


def end_records(model: nn.Module, ends: EndTrajectory, layers: Sequence[str]) -> Iterator[tuple[str, EndRecord]]:
    """Replay the calls of some pictures in float, with what these layers' outputs weigh at the end.

    One call's records are in memory at a time, if none is kept.

    Yields:
        A layer's name and a record of the rows of one fold of the prompts, call by call. A layer whose output does not
        reach the UNet's has no gradients.
    """
    for of_call in ends.calls:
        size = float(of_call.adjoints.abs().amax()) or 1.0  # gradients in 16 bit neither vanish nor overflow
        with _recording(model, layers, len(ends.ends) * ends.probes) as recorder:  # not while a caller runs the layers
            ran, output = _call(model, of_call.call, recorder, list(of_call.adjoints / size))
        while ran:
            name, x, gradients = ran.pop(0)
            prompts = prompts_of_rows(x.shape[0], of_call.call.prompts, output.shape[0])
            gradients = [g * size for g in gradients]
            for record in EndRecord(of_call.call.step, of_call.weights, x, gradients, prompts).folds():
                yield name, record


def chunks_of_layers(
    model: nn.Module, calls: Sequence[UNetCall], probes: int, layers: Sequence[str]
) -> Iterator[list[str]]:
    """Cut the layers into runs whose records of these calls fit the memory; a layer that alone is larger gets its own.

    Args:
        probes: how many there are in each call.
    """
    sizes: dict[str, int] = dict.fromkeys(layers, 0)
    modules = quantizable_layers(model)

    def note(name: str) -> Any:
        def size(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = layer_input(args, kwargs)
            sizes[name] += len(calls) * (x.numel() * x.element_size() + 4 * probes * output.numel())

        return size

    handles = [watch_product(modules[name], note(name)) for name in layers]
    try:
        with torch.no_grad():
            calls[0].run(model)
    finally:
        for handle in handles:
            handle.remove()
    return chunks_within(layers, sizes, MEMORY)
