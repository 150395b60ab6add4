"""A layer's trial: the quantized layer on the recorded inputs of the float one, and the noise that it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.probes import LayerRecord
from ldmq_kernels.calibration.ranges import group_of
from ldmq_kernels.nn import QuantizedLayer, product_of_layer
from ldmq_kernels.nn.kinds import axes_of
from ldmq_kernels.numerics.sums import power_of
from ldmq_kernels.sensitivity.output_noise import StepNoise


@dataclass(frozen=True)
class FloatReference:
    """The outputs of a float layer for its recorded inputs, record by record, and the sum of their squares."""

    records: list[LayerRecord]
    outputs: list[Tensor]
    signal: float

    @classmethod
    def of(cls, layer: nn.Module, records: list[LayerRecord]) -> FloatReference:
        """Run the float layer on its recorded inputs, each cut into two folds."""
        records = [fold for whole in records for fold in whole.folds()]
        outputs = [product_of_layer(layer, record.x).float() for record in records]
        return cls(records, outputs, sum(map(power_of, outputs)))


@dataclass(frozen=True)
class Outcome:
    """The noise of a trial.

    Attributes:
        noise: relative noise power of the layer's own output.
        corrected: noise with the mean error of each channel taken away, as it would be on other samples:
            each fold corrected by the other's mean. None where there is one sample only.
        mean_error: (out,) float32, the mean error of each output channel.
        mean_errors: the mean error of each fold alone; empty where there is one sample only.
    """

    noise: float
    corrected: float | None
    mean_error: Tensor
    mean_errors: tuple[Tensor, ...] = ()


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

    def __call__(self, record: LayerRecord) -> QuantizedLayer:
        """The layer for a record."""
        return self.in_state(self.state(record.step, record.fold))


def try_out(reference: FloatReference, layer_for: Callable[[LayerRecord], nn.Module]) -> Outcome:
    """Run a quantized layer on all recorded inputs of the float one.

    Args:
        layer_for: gives the quantized layer for a record.
    """
    sums: dict[int, Tensor] = {}  # fold -> of each channel's error
    counts, powers = [0, 0], [0.0, 0.0]
    for record, output in zip(reference.records, reference.outputs, strict=True):
        layer = layer_for(record)
        error = _channels_last(product_of_layer(layer, record.x).float() - output, layer)
        total = error.sum(1).sum(0, dtype=torch.float64)
        sums[record.fold] = sums[record.fold] + total if record.fold in sums else total
        counts[record.fold] += error.shape[0] * error.shape[1]
        powers[record.fold] += power_of(error)
    signal = reference.signal or 1.0
    corrected, means = None, []
    if min(counts) > 0:
        means = [sums[fold] / counts[fold] for fold in (0, 1)]
        shared, own = float(means[0] @ means[1]), [float(mean @ mean) for mean in means]
        corrected = sum(powers[i] + counts[i] * (own[1 - i] - 2 * shared) for i in (0, 1)) / signal
    mean = torch.stack(list(sums.values())).sum(0) / sum(counts)
    return Outcome(sum(powers) / signal, corrected, mean.float(), tuple(mean.float() for mean in means))


def estimated_output_noise(
    reference: FloatReference, layer_for: Callable[[LayerRecord], nn.Module]
) -> StepNoise | None:
    """Noise at the UNet's output by the recorded probes; None where there are none.

    Each sample and probe gives one draw of (v . J d)^2, so that the mean over n of them has a relative standard
    deviation of about sqrt(2 / n). Where the layer runs several times in a call of the model, their effects are
    added before they are squared.
    """
    effects: dict[
        tuple[int, int, int], list[list[Tensor]]
    ] = {}  # by step, call, fold: (samples,) of each run and probe
    signals: dict[tuple[int, int, int], float] = {}
    for record, output in zip(reference.records, reference.outputs, strict=True):
        if not record.gradients:
            return None
        error = product_of_layer(layer_for(record), record.x).float() - output
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
