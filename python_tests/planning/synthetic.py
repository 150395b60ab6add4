"""Options with made-up costs, few enough to try every combination, and runs of whole plans that are made up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from ldmq_kernels.calibration import Trajectory
from ldmq_kernels.planning.knapsack import Option
from ldmq_kernels.sensitivity.analysis import Analysis
from ldmq_kernels.sensitivity.output_noise import StepNoise, summed

STEPS = 3
TREND = (1.0, 4.0, 30.0)  # of noise over the steps, which all layers follow more or less
SCHEMES = (("fp16", 16, 2.0), ("w8a16", 8, 2.1), ("w8a8-dynamic", 8, 1.1), ("w8a8-static", 8, 1.0), ("w4a8", 4, 1.0))


def options(seed: int, layers: int = 5, schemes: tuple = SCHEMES) -> list[Option]:
    """Noise by step, times and a signal drawn at random; fewer bits make more noise."""
    random = torch.Generator().manual_seed(seed)

    def draw(count: int, spread: float = 2.0) -> list[float]:
        return (10 ** (spread * (torch.rand(count, generator=random) - 0.5) - 5)).tolist()

    found = []
    for layer in range(layers):
        for scheme, bits, cost in schemes:
            level = draw(1)[0] * (16 / bits) ** 3 * 1e5
            noisy = [level * trend * value for trend, value in zip(TREND, draw(STEPS, 0.4), strict=True)]
            noise = (0.0,) * STEPS if scheme == "fp16" else tuple(noisy)
            signal = 0.0 if scheme == "fp16" else draw(1)[0]
            found.append(
                Option(
                    f"layer{layer}",
                    scheme,
                    noise,
                    bytes=bits * (100 + 37 * layer),
                    operations=cost * (1 + layer),
                    milliseconds=0.01 * bits * (1 + layer % 3) + draw(1)[0],
                    is_float=scheme == "fp16",
                    signals=(("ssim", signal),),
                )
            )
    return found


def every_choice(found: list[Option]) -> Iterator[tuple[Option, ...]]:
    """All combinations of one option a layer."""
    by_layer: dict[str, list[Option]] = {}
    for option in found:
        by_layer.setdefault(option.layer, []).append(option)
    return itertools.product(*by_layer.values())


def mean_db(chosen: tuple[Option, ...], weights: tuple[float, ...]) -> float:
    """The mean over steps of the dB of the sum, from its definition."""
    powers = np.sum([o.noise for o in chosen], axis=0)
    return float(np.dot(weights, -10 * np.log10(np.maximum(powers, 1e-30))))


class SummedRuns:
    """A double of `PlanEvaluator`: whole plans whose noise is the sum of their layers', on every trajectory."""

    def __init__(self, _model: nn.Module, analysis: Analysis) -> None:
        self._analysis = analysis

    def noise(self, schemes: Mapping[str, str], trajectory: Trajectory) -> StepNoise:
        """By step, those between the analysed ones interpolated in dB."""
        output, steps = self._analysis.output, self._analysis.steps
        alone = [output[key] for key in schemes.items() if key in output]
        count = self._analysis.calibration.trajectory.steps
        if not alone:
            return StepNoise(dict.fromkeys(range(count), 0.0))
        total = summed(alone).by_step
        decibels = np.interp(range(count), steps, [10 * math.log10(total[step]) for step in steps])
        return StepNoise({step: float(10 ** (db / 10)) for step, db in enumerate(decibels)})

    def cross_validated(self, schemes: Mapping[str, str]) -> StepNoise:
        """The same along the calibration's trajectory."""
        return self.noise(schemes, self._analysis.calibration.trajectory)


def everything_in(analysis: Analysis, taken: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """(layer, scheme) -> the same value for every layer."""
    return {(name, scheme): value for name in analysis.candidates for scheme, value in taken.items()}
