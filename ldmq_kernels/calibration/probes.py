"""The inputs of each layer in a replay of the float trajectory, and the effect of its noise on the UNet's output.

A small error d of a layer's output moves the UNet's output by J d, J being the Jacobian between the two. For a
random v with independent entries of variance 1, the mean of (v . J d)^2 is |J d|^2, and v . J d = (J^T v) . d:
one backward pass from v gives the weight of every element of every layer's output at once. So the noise of any
number of trials at the UNet's output is estimated from the layer's own inputs, without running the UNet again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.adjoint import CallWeights, EndCall, EndTrajectory, rademacher, scale_of
from ldmq_kernels.calibration.host_memory import host_memory
from ldmq_kernels.calibration.recording import Ran, Recorder, give, recording
from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall, folds_of_rows, prompts_of_rows
from ldmq_kernels.chunks import chunks_within
from ldmq_kernels.nn.kinds import watch_product
from ldmq_kernels.plans.layers import layer_input, quantizable_layers

MEMORY = 4 << 30  # bytes of inputs and gradients that are kept at a time
HOST_MEMORY = 8 << 30  # the same on a CPU, where each further pass over the model takes minutes; a third of it at most
PROBES = 2
GRADIENT_BYTES = 2  # of a `LayerRecord`


@dataclass
class LayerRecord:
    """The record of one call of one layer.

    Attributes:
        step: the sampling step of the call.
        x: the layer's input.
        gradients: J^T v for each probe, of the output's shape and bfloat16, whose rounding is far below the chance of
            which probes were drawn; empty where there were no probes.
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
        output: what the float layer makes of it.
        gradients: (probes, *output.shape) float32, for each probe the weight of each value of the layer's output at the
            end; None where the output does not reach the model's.
        prompts: the prompt of each row; empty where rows are no pictures', such as a time embedding's for all.
    """

    step: int
    weights: CallWeights
    x: Tensor
    output: Tensor
    gradients: Tensor | None
    prompts: tuple[int, ...]

    @property
    def folds(self) -> list[int]:
        """0 or 1 for each row: the half of the prompts that it is of; 0 where rows are no pictures'."""
        return [prompt % 2 for prompt in self.prompts] or [0] * self.x.shape[0]


def _call(
    model: nn.Module, call: UNetCall, recorder: Recorder, vectors: Sequence[Tensor], size: float = 1.0
) -> tuple[list[Ran], Tensor]:
    """What ran of the recorded layers in one call, each with its input and gradients, and the model's output.

    Args:
        vectors: what the output is multiplied with before the gradients; each is a backward pass.
        size: what gradients are multiplied with.
    """
    with torch.set_grad_enabled(bool(vectors)):
        output = call.run(model)
        ran, outputs = recorder.taken()
        for probe, vector in enumerate(vectors if output.requires_grad else ()):
            found = torch.autograd.grad(
                output, outputs, vector.to(output.dtype), retain_graph=probe + 1 < len(vectors), allow_unused=True
            )
            give(ran, found, probe, len(vectors), size)
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
    with recording(model, layers, probes > 0) as recorder:
        for index, call in enumerate(trajectory.calls):
            prompts = call.prompts if len(trajectory.prompts) > 1 else ()
            vectors = [rademacher(call.output, 1000 * index + probe) for probe in range(probes)]
            ran, output = _call(model, call, recorder, vectors)
            signal = float(output.double().square().sum())
            for of_layer in ran:
                rows = folds_of_rows(of_layer.x.shape[0], prompts, output.shape[0])
                gradients = [] if of_layer.gradients is None else list(of_layer.gradients.bfloat16())
                records[of_layer.name].append(
                    LayerRecord(call.step, of_layer.x, signal, gradients, rows=rows, call=index)
                )
    return records


def end_records(model: nn.Module, ends: EndTrajectory, layers: Sequence[str]) -> Iterator[tuple[str, EndRecord]]:
    """Replay the calls of some pictures in float, with what these layers' outputs weigh at the end.

    One call's records are in memory at a time, if none is kept.

    Yields:
        A layer's name and a record, call by call. A layer whose output does not reach the UNet's has no gradients.
    """
    for of_call in ends.calls:
        size = scale_of(of_call.adjoints)
        with recording(model, layers, True) as recorder:  # not while a caller runs the layers
            ran, _ = _call(model, of_call.call, recorder, list(of_call.adjoints / size), size)
        yield from records_of(of_call, ran)


def records_of(of_call: EndCall, ran: list[Ran]) -> Iterator[tuple[str, EndRecord]]:
    """What ran of the layers in a call, as records; `ran` is emptied on the way."""
    call = of_call.call
    while ran:
        found = ran.pop(0)
        prompts = prompts_of_rows(found.x.shape[0], call.prompts, call.output.shape[0])
        yield found.name, EndRecord(call.step, of_call.weights, found.x, found.output, found.gradients, prompts)


def _memory(model: nn.Module) -> int:
    """Bytes of records that are kept at a time."""
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return MEMORY
    return min(HOST_MEMORY, host_memory() // 3)


def _bytes_of_records(
    model: nn.Module, calls: Sequence[UNetCall], layers: Sequence[str], of_output: Callable[[Tensor], int]
) -> dict[str, int]:
    """Bytes of each layer's inputs in some calls, and of what else is kept, by the layer's output."""
    sizes: dict[str, int] = dict.fromkeys(layers, 0)
    modules = quantizable_layers(model)

    def note(name: str) -> Any:
        def size(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = layer_input(args, kwargs)
            sizes[name] += len(calls) * (x.nbytes + of_output(output))

        return size

    handles = [watch_product(modules[name], note(name)) for name in layers]
    try:
        with torch.no_grad():
            calls[0].run(model)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def chunks_of_layers(
    model: nn.Module, calls: Sequence[UNetCall], probes: int, layers: Sequence[str]
) -> Iterator[list[str]]:
    """Cut the layers into runs whose records of these calls fit the memory; a layer that alone is larger gets its own.

    Args:
        probes: how many there are in each call.
    """
    sizes = _bytes_of_records(model, calls, layers, lambda output: GRADIENT_BYTES * probes * output.numel())
    return chunks_within(layers, sizes, _memory(model))


def chunks_with_room(
    model: nn.Module, call: UNetCall, probes: int, layers: Sequence[str]
) -> Iterator[tuple[list[str], int]]:
    """The same for records of one call, each run with how many calls' records of it fit the memory, one at least."""
    sizes = _bytes_of_records(model, [call], layers, lambda output: output.nbytes + 4 * probes * output.numel())
    for chunk in chunks_within(layers, sizes, MEMORY):
        yield chunk, max(1, MEMORY // max(1, sum(sizes[name] for name in chunk)))
