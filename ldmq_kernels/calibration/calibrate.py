"""Calibration: one run of the full-precision pipeline over the user's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldmq_kernels.calibration.ranges import ALL_STEPS, FIRST_STEP, RangeObserver, calibrated_absmax
from ldmq_kernels.calibration.trajectory import SamplingSettings, Trajectory, denoiser, record_trajectory
from ldmq_kernels.nn import QuantizedLayer


@dataclass(frozen=True)
class Calibration:
    """What was seen: the float trajectory, and ranges by layer, step and channel.

    Attributes:
        mode: which steps static scales come from, "first-step" (the paper's way) or "all-steps".
        absmax: layer -> (steps, C) float32.
        operations: layer -> multiply-accumulates in one call of the UNet.
    """

    mode: str
    settings: SamplingSettings
    prompts: tuple[str, ...]
    trajectory: Trajectory
    absmax: dict[str, Tensor]
    operations: dict[str, int]

    def input_absmax(self, layer: str) -> Tensor:
        """(C,) float32, over the steps that the mode calibrates on."""
        return calibrated_absmax(self.absmax[layer], self.mode)


def calibrate(
    pipe: Any, prompts: Sequence[str], settings: SamplingSettings, *, mode: str = FIRST_STEP, show: bool = False
) -> Calibration:
    """Run the pipeline once on the prompts and observe every linear and convolution of its UNet.

    Args:
        mode: "first-step" or "all-steps". All steps are observed in both, so that the drift can be
            told; the mode says which of them make the static scales.

    Raises:
        ValueError: no prompts, an unknown mode, a quantized model, or values that are not finite
            (naming the layer).
    """
    if mode not in (FIRST_STEP, ALL_STEPS):
        raise ValueError(f"unknown calibration {mode!r}: choose {FIRST_STEP} or {ALL_STEPS}")
    model = denoiser(pipe)
    if any(isinstance(m, QuantizedLayer) and m.scheme.quantizes for m in model.modules()):
        raise ValueError("the model is quantized already: calibrate and plan on the full-precision model")
    observer = RangeObserver(model)
    try:
        trajectory = record_trajectory(pipe, prompts, settings, show=show, on_step=observer.at_step)
    finally:
        observer.close()
    return Calibration(mode, settings, tuple(prompts), trajectory, observer.absmax(), observer.operations)
