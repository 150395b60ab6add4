"""Noise at the UNet's output along the float trajectory, by sampling step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ldmq_kernels.calibration.trajectory import Trajectory, replay
from ldmq_kernels.numerics.sqnr import to_db


@dataclass(frozen=True)
class StepNoise:
    """Relative noise power at the output for each sampling step that was measured, steps ascending."""

    by_step: dict[int, float]

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
    originals = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in originals.items():
            model.set_submodule(name, layer)


def output_noise(model: nn.Module, trajectory: Trajectory) -> StepNoise:
    """Replay the trajectory with the model as it is now and compare its outputs with the recorded ones.

    Classifier-free guidance's halves are pooled, as are all prompts; sums in float64.

    Raises:
        ValueError: the model's output is not finite.
    """
    signal: dict[int, float] = {}
    noise: dict[int, float] = {}
    for call, output in replay(model, trajectory):
        exact = call.output.double()
        found = float((output.double() - exact).square().sum())
        if not math.isfinite(found):
            raise ValueError(f"the quantized model's output is not finite at sampling step {call.step}")
        signal[call.step] = signal.get(call.step, 0.0) + float(exact.square().sum())
        noise[call.step] = noise.get(call.step, 0.0) + found
    return StepNoise({step: noise[step] / signal[step] for step in sorted(signal)})


def spread_steps(steps: int, count: int) -> list[int]:
    """`count` sampling steps spread evenly, the first and the last among them."""
    if count >= steps:
        return list(range(steps))
    if count == 1:
        return [0]
    return sorted({round(i * (steps - 1) / (count - 1)) for i in range(count)})


def block_of(layer: str) -> str:
    """The block of a UNet that a layer is in: "down_blocks.0.resnets.1", "mid_block.attentions.0", "conv_in"."""
    parts = layer.split(".")
    length = {"down_blocks": 4, "up_blocks": 4, "mid_block": 3}.get(parts[0], 1)
    return ".".join(parts[: min(length, len(parts) - 1) or 1])


def finite_db(power: float) -> float:
    """SQNR in dB for files and pictures, with no noise at all as 200 dB."""
    return min(200.0, to_db(power)) if power > 0 else 200.0


def total_noise(signal: torch.Tensor, test: torch.Tensor) -> tuple[float, float]:
    """Sums of squares of the signal and of the error, in float64."""
    exact = signal.double()
    return float(exact.square().sum()), float((test.double() - exact).square().sum())
