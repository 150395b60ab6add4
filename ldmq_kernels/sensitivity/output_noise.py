"""Noise at the UNet's output along the float trajectory, by sampling step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ldmq_kernels.calibration.settings import setting_of
from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall, replay
from ldmq_kernels.numerics.sqnr import to_db
from ldmq_kernels.plans.layers import place_of

PARTS = ("unconditional", "conditional", "guided")


@dataclass(frozen=True)
class SampleNoise:
    """Sums of squares of one sample's signal and error at one step: of a prompt, or of all that one call draws.

    `part` is "unconditional" or "conditional", the halves of classifier-free guidance, "guided", what guidance
    makes of them, or "whole" where there is no guidance.
    """

    step: int
    prompt: int
    part: str
    signal: float
    noise: float


@dataclass(frozen=True)
class StepNoise:
    """Relative noise power at the output for each sampling step that was measured, steps ascending.

    Classifier-free guidance's halves are pooled before guidance, as are all prompts; `samples` holds them apart
    where they were measured.
    """

    by_step: dict[int, float]
    samples: tuple[SampleNoise, ...] = field(default=(), compare=False)

    @property
    def mean_power(self) -> float:
        """Mean over steps of the relative noise power: what the planner adds up."""
        return sum(self.by_step.values()) / len(self.by_step)

    @property
    def mean_db(self) -> float:
        """Mean over steps of SQNR in dB: the target that users give."""
        return sum(self.db_by_step.values()) / len(self.by_step)

    @property
    def db_by_step(self) -> dict[int, float]:
        """SQNR in dB of each step."""
        return {step: to_db(power) for step, power in self.by_step.items()}


@contextlib.contextmanager
def swapped(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in place of some of a model's, by name, inside this block."""
    places = {place_of(model, name): layer for name, layer in layers.items()}
    originals = {place: model.get_submodule(place) for place in places}
    try:
        for place, layer in places.items():
            model.set_submodule(place, layer)
        yield
    finally:
        for place, layer in originals.items():
            model.set_submodule(place, layer)


def summed(noises: Iterable[StepNoise]) -> StepNoise:
    """The noise of several changes together: their powers add, step by step."""
    total: dict[int, float] = {}
    for noise in noises:
        for step, power in noise.by_step.items():
            total[step] = total.get(step, 0.0) + power
    return StepNoise(dict(sorted(total.items())))


def _sample_noise(call: UNetCall, output: Tensor) -> Iterator[SampleNoise]:
    error, signal = output.double() - call.output.double(), call.output.double()
    parts = [(error, signal, "whole")]
    if call.guidance_scale is not None:
        (error_u, error_c), (signal_u, signal_c) = error.chunk(2), signal.chunk(2)
        guided_error = error_u + call.guidance_scale * (error_c - error_u)
        guided_signal = signal_u + call.guidance_scale * (signal_c - signal_u)
        parts = [(error_u, signal_u, PARTS[0]), (error_c, signal_c, PARTS[1]), (guided_error, guided_signal, PARTS[2])]
    for error, signal, part in parts:
        noises, signals = (_by_sample(value, len(call.prompts)) for value in (error, signal))
        for prompt, power, of in zip(call.prompts, noises, signals, strict=True):
            yield SampleNoise(call.step, prompt, part, of, power)


def _by_sample(value: Tensor, samples: int) -> list[float]:
    """The sum of squares of each sample's rows; with several rows a sample, the samples follow each other again."""
    of_rows = value.flatten(1).square().sum(1)
    totals: list[float] = of_rows.reshape(-1, samples).sum(0).tolist()
    return totals


def output_noise(model: nn.Module, trajectory: Trajectory, *, by_sample: bool = False) -> StepNoise:
    """Replay the trajectory with the model as it is now and compare its outputs with the recorded ones.

    Args, Raises: as of `noise_of_calls`.
    """
    return noise_of_calls(replay(model, trajectory), by_sample=by_sample)


def noise_of_calls(calls: Iterable[tuple[UNetCall, Tensor]], *, by_sample: bool = False) -> StepNoise:
    """The noise of new outputs of some calls, against those that were recorded.

    Args:
        by_sample: keep the noise of each prompt and half too. Sums are in float64.

    Raises:
        ValueError: the model's output is not finite.
    """
    samples: list[SampleNoise] = []
    signal: dict[int, float] = {}
    noise: dict[int, float] = {}
    for call, output in calls:
        exact = call.output.double()
        power = float((output.double() - exact).square().sum())
        if not math.isfinite(power):
            raise ValueError(f"the quantized model's output is not finite at sampling step {call.step}")
        signal[call.step] = signal.get(call.step, 0.0) + float(exact.square().sum())
        noise[call.step] = noise.get(call.step, 0.0) + power
        if by_sample:
            samples += _sample_noise(call, output)
    return StepNoise({step: noise[step] / signal[step] for step in sorted(signal)}, tuple(samples))


def pooled(noises: Sequence[StepNoise]) -> StepNoise:
    """The noise of several runs for different prompts, which have samples, as that of one run for all."""
    samples = tuple(sample for noise in noises for sample in noise.samples)
    signal: dict[int, float] = {}
    noise: dict[int, float] = {}
    for sample in samples:
        if sample.part != PARTS[2]:
            signal[sample.step] = signal.get(sample.step, 0.0) + sample.signal
            noise[sample.step] = noise.get(sample.step, 0.0) + sample.noise
    return StepNoise({step: noise[step] / signal[step] for step in sorted(signal)}, samples)


def by_setting(noise: StepNoise, settings: int) -> list[StepNoise]:
    """The noise at each of several settings that its samples were drawn at; as it is where there is one."""
    if settings == 1:
        return [noise]
    parts: list[list[SampleNoise]] = [[] for _ in range(settings)]
    for sample in noise.samples:
        parts[setting_of(sample.prompt, settings)].append(sample)
    return [pooled([StepNoise({}, tuple(part))]) for part in parts]


def finite_db(power: float) -> float:
    """SQNR in dB for files and pictures, with no noise at all as 200 dB."""
    return min(200.0, to_db(power)) if power > 0 else 200.0
