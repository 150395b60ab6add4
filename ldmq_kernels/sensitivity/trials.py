"""A layer's trial: the quantized layer on the recorded inputs of the float one, and the noise that it makes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.probes import LayerRecord
from ldmq_kernels.calibration.ranges import group_of
from ldmq_kernels.nn import QuantizedLayer, product_of_layer
from ldmq_kernels.nn.kinds import axes_of
from ldmq_kernels.numerics.sums import power_of
from ldmq_kernels.sensitivity.output_noise import StepNoise

KEPT = 1 << 28  # bytes of a trial's errors that wait for the estimate; larger ones are computed again
AT_ONCE = 1 << 23  # elements of inputs that a layer multiplies together, or one record's


def _of_each(values: Tensor, records: Sequence[LayerRecord]) -> Sequence[Tensor]:
    """The rows of each record; of one alone all, which without a batch are channels."""
    return (values,) if len(records) == 1 else values.split([record.x.shape[0] for record in records])


@dataclass(frozen=True)
class Batch:
    """Recorded calls of one fold, one after the other, whose rows a layer multiplies together: a product costs less so.

    Attributes:
        records: their inputs are the rows of `x` in turn.
        output: of the float layer for x, float32.
    """

    records: list[LayerRecord]
    x: Tensor
    output: Tensor

    @classmethod
    def of(cls, layer: nn.Module, records: list[LayerRecord]) -> Batch:
        """Run the float layer on the inputs of some records of one fold, whose rows are of one shape."""
        x = torch.cat([record.x for record in records])
        parts = x.split([record.x.shape[0] for record in records])
        records = [replace(record, x=part) for record, part in zip(records, parts, strict=True)]
        return cls(records, x, product_of_layer(layer, x).float())

    def outputs(self) -> Iterator[tuple[LayerRecord, Tensor]]:
        """Each record with the output of its rows."""
        return zip(self.records, _of_each(self.output, self.records), strict=True)


@dataclass(frozen=True)
class FloatReference:
    """The outputs of a float layer for its recorded inputs, and the sum of their squares."""

    batches: list[Batch]
    signal: float

    @classmethod
    def of(cls, layer: nn.Module, records: list[LayerRecord]) -> FloatReference:
        """Run the float layer on its recorded inputs, each cut into two folds."""
        together: dict[tuple[int, int, torch.Size], list[list[LayerRecord]]] = {}
        axes = axes_of(layer)
        for index, record in enumerate(fold for whole in records for fold in whole.folds()):
            has_rows = record.x.dim() == axes + 2 if axes else record.x.dim() > 1
            key = record.fold, 0 if has_rows else 1 + index, record.x.shape[1:]
            of_fold = together.setdefault(key, [[]])
            if sum(known.x.numel() for known in of_fold[-1]) + record.x.numel() > AT_ONCE and of_fold[-1]:
                of_fold.append([])
            of_fold[-1].append(record)
        batches = [Batch.of(layer, some) for of_fold in together.values() for some in of_fold]
        return cls(batches, sum(power_of(batch.output) for batch in batches))

    def outputs(self) -> Iterator[tuple[LayerRecord, Tensor]]:
        """Each record with the float layer's output."""
        return (pair for batch in self.batches for pair in batch.outputs())


Errors = list[tuple[list[LayerRecord], Tensor]]  # records of one fold, and what a quantized layer adds to their output


@dataclass(frozen=True)
class Outcome:
    """The noise of a trial.

    Attributes:
        noise: relative noise power of the layer's own output.
        corrected: noise with the mean error of each channel taken away, as it would be on other samples:
            each fold corrected by the other's mean. None where there is one sample only.
        mean_error: (out,) float32, the mean error of each output channel.
        mean_errors: the mean error of each fold alone; empty where there is one sample only.
        errors: as `Judge.errors` has them; None where they are too large to wait.
    """

    noise: float
    corrected: float | None
    mean_error: Tensor
    mean_errors: tuple[Tensor, ...] = ()
    errors: Errors | None = field(default=None, compare=False)


def _channels_last(output: Tensor, layer: nn.Module) -> Tensor:
    """Reshape the output of a linear or convolution to (samples, positions, channels)."""
    axes = axes_of(layer)
    if axes:
        batch = output if output.dim() == axes + 2 else output.unsqueeze(0)
        return batch.movedim(1, -1).flatten(1, -2)
    return output.unsqueeze(1) if output.dim() == 2 else output.flatten(1, -2)


@dataclass(frozen=True)
class Judge:
    """Gives for a step and a fold of the prompts the layer as the other fold makes it, set to that step.

    Attributes:
        layers: for the records of each fold; one for both where nothing is taken from the inputs.
        boundaries: of the timestep groups, for layers that have a scale for each.
    """

    layers: Sequence[QuantizedLayer]
    timesteps: Sequence[float]
    boundaries: Sequence[float]

    def state(self, step: int, fold: int) -> tuple[int, int]:
        """Which of the layers it is, and its timestep group."""
        which = fold % len(self.layers)
        has_groups = self.layers[which].scheme.has_timestep_scales
        return which, group_of(self.timesteps[step], self.boundaries) if has_groups else 0

    def in_state(self, state: tuple[int, int]) -> QuantizedLayer:
        """The layer that steps and folds of this state have in common, until the next is asked for."""
        layer = self.layers[state[0]]
        if layer.scheme.has_timestep_scales:
            layer.use_timestep_group(state[1])
        return layer

    def errors(self, reference: FloatReference) -> Iterator[tuple[list[LayerRecord], Tensor]]:
        """Records of one fold and state, with the error of the output for their rows, float32."""
        for batch in reference.batches:
            end = 0
            for state, run in itertools.groupby(batch.records, lambda record: self.state(record.step, record.fold)):
                records = list(run)
                start, end = end, end + sum(record.x.shape[0] for record in records)
                own = slice(start, end) if len(records) < len(batch.records) else slice(None)
                output = product_of_layer(self.in_state(state), batch.x[own])
                yield records, output.float() - batch.output[own]


def try_out(reference: FloatReference, judge: Judge) -> Outcome:
    """Run a quantized layer on all recorded inputs of the float one."""
    sums: dict[int, Tensor] = {}  # fold -> of each channel's error
    counts, powers = [0, 0], [0.0, 0.0]
    kept: Errors = []
    is_kept = sum(batch.output.nbytes for batch in reference.batches) <= KEPT
    for records, by_row in judge.errors(reference):
        if is_kept:
            kept.append((records, by_row))
        error, fold = _channels_last(by_row, judge.layers[0]), records[0].fold
        total = error.sum(1).sum(0, dtype=torch.float64)
        sums[fold] = sums[fold] + total if fold in sums else total
        counts[fold] += error.shape[0] * error.shape[1]
        powers[fold] += power_of(error)
    signal = reference.signal or 1.0
    corrected, means = None, []
    if min(counts) > 0:
        means = [sums[fold] / counts[fold] for fold in (0, 1)]
        shared, own = float(means[0] @ means[1]), [float(mean @ mean) for mean in means]
        corrected = sum(powers[i] + counts[i] * (own[1 - i] - 2 * shared) for i in (0, 1)) / signal
    mean = torch.stack(list(sums.values())).sum(0) / sum(counts)
    by_fold = tuple(mean.float() for mean in means)
    return Outcome(sum(powers) / signal, corrected, mean.float(), by_fold, kept if is_kept else None)


def shifted(errors: Errors, shifts: Sequence[Tensor], layer: nn.Module) -> Iterator[tuple[list[LayerRecord], Tensor]]:
    """Errors of a layer with another bias: `shifts` is what it has more, (out,), in each fold or in both."""
    for records, error in errors:
        yield records, error + shifts[records[0].fold % len(shifts)].view(-1, *[1] * axes_of(layer))


def estimated_output_noise(
    reference: FloatReference, errors: Iterable[tuple[list[LayerRecord], Tensor]]
) -> StepNoise | None:
    """Noise at the UNet's output by the recorded probes; None where there are none.

    Each sample and probe gives one draw of (v . J d)^2, so that the mean over n of them has a relative standard
    deviation of about sqrt(2 / n). Where the layer runs several times in a call of the model, their effects are
    added before they are squared.

    Args:
        errors: as `Judge.errors` has them.
    """
    if not all(record.gradients for batch in reference.batches for record in batch.records):
        return None
    effects: dict[
        tuple[int, int, int], list[list[Tensor]]
    ] = {}  # by step, call, fold: (samples,) of each run and probe
    signals: dict[tuple[int, int, int], float] = {}
    for records, of_rows in errors:
        for record, error in zip(records, _of_each(of_rows, records), strict=True):
            key = record.step, record.call, record.fold
            draws = [(error * g).sum(tuple(range(1, g.dim()))).double() for g in record.gradients]
            effects.setdefault(key, []).append(draws)
            signals[key] = record.signal
    noise: dict[int, float] = {}
    signal: dict[int, float] = {}
    for key, power in signals.items():
        step = key[0]
        of_probes = [_together(runs) for runs in zip(*effects[key], strict=True)]
        noise[step] = noise.get(step, 0.0) + float(sum(d.square().sum() for d in of_probes)) / len(of_probes)
        signal[step] = signal.get(step, 0.0) + power
    return StepNoise({step: noise[step] / signal[step] for step in sorted(signal)})


def _together(runs: Sequence[Tensor]) -> Tensor:
    """The effects of several runs of a layer for the same samples; of other numbers of rows, of all rows at once."""
    same = len({run.shape for run in runs}) == 1
    return torch.stack(list(runs)).sum(0) if same else torch.stack([run.sum() for run in runs]).sum(0, keepdim=True)
