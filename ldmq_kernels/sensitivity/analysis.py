"""The whole analysis: each candidate of each layer, and each block, at the UNet's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.ranges import range_drift
from ldmq_kernels.calibration.trajectory import denoiser
from ldmq_kernels.numerics.formats import Scheme
from ldmq_kernels.planning.plan import quantizable_layers
from ldmq_kernels.progress import track
from ldmq_kernels.sensitivity.local_noise import Candidate, local_candidates, quantized_copy
from ldmq_kernels.sensitivity.output_noise import StepNoise, block_of, output_noise, spread_steps, swapped

ANALYSED_STEPS = 4


@dataclass(frozen=True)
class Analysis:
    """What every choice costs in noise.

    Attributes:
        candidates: layer -> its candidates, at most one a scheme.
        output: (layer, scheme) -> noise at the UNet's output with this layer alone quantized so.
        blocks: (block, scheme) -> noise at the output with this block alone quantized so.
    """

    calibration: Calibration
    steps: list[int]
    candidates: dict[str, list[Candidate]]
    output: dict[tuple[str, str], StepNoise]
    blocks: dict[tuple[str, str], StepNoise]

    def drift(self) -> dict[str, float]:
        """Layer -> how many times larger its input gets than at the first step."""
        return {name: range_drift(by_step) for name, by_step in self.calibration.absmax.items()}

    def candidate(self, layer: str, scheme: str) -> Candidate | None:
        """The candidate of a layer for a scheme, if the layer can have it."""
        return next((c for c in self.candidates[layer] if str(c.scheme) == scheme), None)


@torch.no_grad()
def analyze(
    pipe: Any,
    calibration: Calibration,
    schemes: Sequence[Scheme],
    *,
    analysed_steps: int = ANALYSED_STEPS,
    show: bool = False,
) -> Analysis:
    """Measure SQNR at the UNet's output for every layer and every block, in each scheme.

    Args:
        pipe: the pipeline that was calibrated, still in full precision.
        schemes: what to try; the float scheme needs no trial.
        analysed_steps: how many sampling steps, spread over the trajectory, each trial is run on.
    """
    model = denoiser(pipe)
    modules = quantizable_layers(model)
    trials = [scheme for scheme in schemes if scheme.quantizes]
    steps = spread_steps(calibration.trajectory.steps, analysed_steps)
    trajectory = calibration.trajectory.at_steps(steps)
    candidates = local_candidates(model, calibration, trials, steps, show=show)

    def noise_of(chosen: dict[str, Candidate]) -> StepNoise:
        copies: dict[str, nn.Module] = {
            name: quantized_copy(modules[name], candidate.layer_plan()) for name, candidate in chosen.items()
        }
        with swapped(model, copies):
            return output_noise(model, trajectory)

    pairs = [(name, candidate) for name, found in candidates.items() for candidate in found]
    output = {
        (name, str(candidate.scheme)): noise_of({name: candidate})
        for name, candidate in track(pairs, "SQNR of each layer", len(pairs), show=show)
    }
    members: dict[tuple[str, str], dict[str, Candidate]] = {}
    for name, candidate in pairs:
        members.setdefault((block_of(name), str(candidate.scheme)), {})[name] = candidate
    blocks = {
        key: noise_of(chosen)
        for key, chosen in track(list(members.items()), "SQNR of each block", len(members), show=show)
    }
    return Analysis(calibration, steps, candidates, output, blocks)
