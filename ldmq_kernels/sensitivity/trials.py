"""A layer's trial: its quantized copy on what the float layer saw, and the noise that it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.ranges import group_of
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.sensitivity.output_noise import StepNoise
from ldmq_kernels.sensitivity.probes import Seen


@dataclass(frozen=True)
class Exact:
    """A float layer on what it saw: its outputs, call by call, and the sum of their squares."""

    seen: list[Seen]
    outputs: list[Tensor]
    signal: float

    @classmethod
    def of(cls, layer: nn.Module, seen: list[Seen]) -> Exact:
        """Run the float layer on its recorded inputs, each cut into two folds."""
        seen = [fold for whole in seen for fold in whole.folds()]
        outputs = [layer(s.x).float() for s in seen]
        return cls(seen, outputs, sum(float(out.double().square().sum()) for out in outputs))


@dataclass(frozen=True)
class Outcome:
    """The noise of a trial.

    Attributes:
        noise: of the layer's own output, relative.
        corrected: the same with the mean error of each channel taken away, as it would be on other samples:
            each fold corrected by the other's mean. None where there is one sample only.
        mean_error: (out,) float32, of output channels.
        mean_errors: the same of each fold alone; empty where there is one sample only.
    """

    noise: float
    corrected: float | None
    mean_error: Tensor
    mean_errors: tuple[Tensor, ...] = ()


def _channels_last(output: Tensor) -> Tensor:
    """(samples, positions, channels) of a linear's or a convolution's output."""
    if output.dim() == 4:
        return output.permute(0, 2, 3, 1).flatten(1, 2)
    return output.unsqueeze(1) if output.dim() == 2 else output.flatten(1, -2)


def set_to_step(
    copy: QuantizedLayer, timesteps: Sequence[float], boundaries: Sequence[float]
) -> Callable[[Seen], QuantizedLayer]:
    """Gives the copy for a call, set to the timestep group of its step where it has scales of timesteps."""

    def copy_for(seen: Seen) -> QuantizedLayer:
        if copy.scheme.has_timestep_scales:
            copy.use_timestep_group(group_of(timesteps[seen.step], boundaries))
        return copy

    return copy_for


def try_out(exact: Exact, copy_for: Callable[[Seen], nn.Module]) -> Outcome:
    """Run a trial on all that the layer saw.

    Args:
        copy_for: gives the quantized layer for a call.
    """
    sums: dict[int, Tensor] = {}  # fold -> of each channel's error
    counts, powers = [0, 0], [0.0, 0.0]
    for seen, output in zip(exact.seen, exact.outputs, strict=True):
        error = _channels_last(copy_for(seen)(seen.x).float() - output)
        total = error.sum((0, 1), dtype=torch.float64)
        sums[seen.fold] = sums[seen.fold] + total if seen.fold in sums else total
        counts[seen.fold] += error.shape[0] * error.shape[1]
        powers[seen.fold] += float(error.double().square().sum())
    signal = exact.signal or 1.0
    corrected, means = None, []
    if min(counts) > 0:
        means = [sums[fold] / counts[fold] for fold in (0, 1)]
        shared, own = float(means[0] @ means[1]), [float(mean @ mean) for mean in means]
        corrected = sum(powers[i] + counts[i] * (own[1 - i] - 2 * shared) for i in (0, 1)) / signal
    mean = torch.stack(list(sums.values())).sum(0) / sum(counts)
    return Outcome(sum(powers) / signal, corrected, mean.float(), tuple(mean.float() for mean in means))


def estimated_output_noise(exact: Exact, copy_for: Callable[[Seen], nn.Module]) -> StepNoise | None:
    """Noise at the UNet's output by the recorded probes; None where there are none.

    Each sample and probe gives one draw of (v . J d)^2, so that the mean over n of them has a relative standard
    deviation of about sqrt(2 / n).
    """
    noise: dict[int, float] = {}
    signal: dict[int, float] = {}
    for seen, output in zip(exact.seen, exact.outputs, strict=True):
        if not seen.gradients:
            return None
        error = copy_for(seen)(seen.x).float() - output
        draws = [(error * g).flatten(1).sum(1, dtype=torch.float64).square() for g in seen.gradients]
        noise[seen.step] = noise.get(seen.step, 0.0) + float(sum(d.sum() for d in draws)) / len(draws)
        signal[seen.step] = signal.get(seen.step, 0.0) + seen.signal
    return StepNoise({step: noise[step] / signal[step] for step in sorted(signal)})
