"""Before and after: pictures from the same noise, and times taken in turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.drawings import PICTURES, Call, draw
from ldmq_kernels.calibration.outputs import as_pictures
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import UNetCall
from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan
from ldmq_kernels.sensitivity.output_noise import swapped
from ldmq_kernels.timing import Context, interleaved, wall_ms

UNCOUNTED = 2  # first rounds of a timing
IDENTICAL_DB = 100.0  # PSNR that stands for pictures without any difference


@dataclass(frozen=True)
class PicturePairs:
    """Pictures of the same prompts and seeds: `before` and `after` are (N, 3, H, W) in [0, 1], on the CPU."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    before: Tensor
    after: Tensor

    def first(self, count: int) -> PicturePairs:
        """The first pairs, at most `count` of them."""
        shown = slice(0, count)
        return PicturePairs(self.prompts[shown], self.seeds[shown], self.before[shown], self.after[shown])

    @property
    def psnr_db(self) -> list[float]:
        """PSNR of each pair in dB, against a peak of 1; identical pictures have 100 dB."""
        error = (self.after.double() - self.before.double()).square().flatten(1).mean(1)
        return [min(IDENTICAL_DB, -10 * math.log10(e)) if e > 0 else IDENTICAL_DB for e in error.tolist()]

    @property
    def pooled_psnr_db(self) -> float:
        """PSNR of all pictures together in dB, from the mean squared error over all of them."""
        error = float((self.after.double() - self.before.double()).square().mean())
        return min(IDENTICAL_DB, -10 * math.log10(error)) if error > 0 else IDENTICAL_DB


@dataclass(frozen=True)
class Timing:
    """Seconds of the same work before and after: medians of rounds taken in turns."""

    what: str
    before: float
    after: float

    @property
    def speedup(self) -> float:
        """Above 1 where the quantized model is faster."""
        return self.before / self.after


def draw_pictures(
    pipe: Any, calls: Sequence[Call], settings: SamplingSettings, what: str, *, show: bool = False
) -> Tensor:
    """(N, 3, H, W) float32 in [0, 1] on the CPU, one or more for each call; seeds count up from `settings.seed`.

    Raises:
        ValueError: the pipeline draws no pictures, or pictures of several sizes.
    """
    pictures = [as_pictures(drawn) for drawn in draw(pipe, calls, settings, PICTURES, what, show=show)]
    sizes = {tuple(of_run.shape[1:]) for of_run in pictures}
    if len(sizes) != 1:
        raise ValueError(f"the pipeline draws pictures of {len(sizes)} sizes, and one is needed: {sorted(sizes)}")
    return torch.cat(pictures)


@torch.no_grad()
def time_plan(model: nn.Module, plan: Plan, call: UNetCall, *, rounds: int = 7) -> Timing:
    """Time one recorded call of a float model, and of the same model with the plan's layers in place.

    Weights are rounded to nearest and all steps take the first group's scales: any others take as long.

    Raises:
        PlanError: the plan does not fit the model.
    """
    layers = quantizable_layers(model)
    chosen = {name: p for name, p in plan.layers(model).items() if p.scheme.quantizes}
    quantized: dict[str, nn.Module] = {
        name: quantize_layer(name, layers[name], replace(p, rounding="nearest")) for name, p in chosen.items()
    }

    def run() -> None:
        call.run(model)

    contexts: dict[str, Context] = {"before": nullcontext, "after": partial(swapped, model, quantized)}
    samples = interleaved(
        dict.fromkeys(contexts, run),
        call.output.device,
        rounds=rounds,
        warm_up=UNCOUNTED,
        clock=wall_ms,
        contexts=contexts,
    )
    before, after = (taken.median / 1e3 for taken in samples.values())
    return Timing(f"one UNet call, batch {call.output.shape[0]}", before, after)
