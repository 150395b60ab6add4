"""Calibration: one run of the full-precision pipeline over what the user will draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration import ranges
from ldmq_kernels.calibration.concatenations import concatenated_inputs
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.drawings import Call
from ldmq_kernels.calibration.ranges import ALL_STEPS, FIRST_STEP, MODES, RangeObserver
from ldmq_kernels.calibration.settings import SamplingSettings, Settings, each_of
from ldmq_kernels.calibration.trajectory import Trajectory, record_trajectory
from ldmq_kernels.nn import QuantizedLayer


@dataclass(frozen=True)
class Calibration:
    """One calibration run: the float trajectory, and the ranges of inputs by layer, step and channel.

    Attributes:
        mode: which steps static scales come from: "first-step" (the paper's way), "sampled-steps", "drawn-steps" or
            "all-steps".
        settings: one or several, at each of which everything was drawn.
        absmax: layer -> (steps, C) float32.
        operations: layer -> multiply-accumulates in one call of the UNet.
        calls: what was drawn: prompts, arguments of the pipeline's own call, or functions that run it.
        first_tokens: layer that reads the text -> (2, steps, C) float32, the range of the text's first token in each
            half of the prompts, which `absmax` and `absmax_by_fold` leave out.
        concatenations: layer -> channels of the first part, where the input is a concatenation of two.
        timestep_groups: descending timesteps between the groups that a timestep scale has.
        absmax_by_fold: layer -> (2, steps, C) float32, `absmax` of each half of the prompts, by which layer plans
            are cross-validated; empty where there is one prompt.
        of_conditions: layers of a transformer that read the time or a pooled text alone, such as adaptive norms' own
            linears: their ranges come from all steps in every mode, since nothing but the time moves them.
    """

    mode: str
    settings: tuple[SamplingSettings, ...]
    calls: tuple[Call, ...]
    trajectory: Trajectory
    absmax: dict[str, Tensor]
    operations: dict[str, int]
    first_tokens: dict[str, Tensor] = field(default_factory=dict)
    concatenations: dict[str, int] = field(default_factory=dict)
    timestep_groups: tuple[float, ...] = ()
    absmax_by_fold: dict[str, Tensor] = field(default_factory=dict)
    of_conditions: frozenset[str] = frozenset()

    def of_fold(self, fold: int) -> Calibration:
        """The calibration by half of the prompts alone; by all of them where there is one prompt."""
        if not self.absmax_by_fold:
            return self
        return replace(self, absmax={name: absmax[fold] for name, absmax in self.absmax_by_fold.items()})

    @property
    def text_layers(self) -> frozenset[str]:
        """Layers that read the text."""
        return frozenset(self.first_tokens)

    def with_first_token(self) -> Calibration:
        """The calibration with the text's first token in the ranges of the layers that read it."""
        by_fold, whole = dict(self.absmax_by_fold), dict(self.absmax)
        for name, first in self.first_tokens.items():
            whole[name] = torch.maximum(whole[name], first.amax(0))
            if name in by_fold:
                by_fold[name] = torch.maximum(by_fold[name], first)
        return replace(self, absmax=whole, absmax_by_fold=by_fold)

    def input_absmax(self, layer: str) -> Tensor:
        """(C,) float32, over the steps that the mode calibrates on."""
        mode = ALL_STEPS if layer in self.of_conditions else self.mode
        return ranges.calibrated_absmax(self.absmax[layer], mode)

    def grouped_absmax(self, layer: str) -> Tensor:
        """(groups, C) float32, over all steps of each timestep group."""
        return ranges.grouped_absmax(self.absmax[layer], self.trajectory.timesteps(), self.timestep_groups)


def check_full_precision(model: nn.Module) -> None:
    """Refuse a model that is not as plans speak of it.

    Raises:
        ValueError: it is quantized.
    """
    if any(isinstance(module, QuantizedLayer) and module.scheme.quantizes for module in model.modules()):
        raise ValueError("the model is quantized already: calibrate and plan on the full-precision model")


def calibrate(
    pipe: Any,
    calls: Sequence[Call],
    settings: Settings,
    *,
    mode: str = FIRST_STEP,
    whole: bool = True,
    show: bool = False,
) -> Calibration:
    """Run the pipeline once on everything that is given and observe every linear and convolution of its UNet.

    Args:
        calls: prompts, mappings of arguments of the pipeline's own call, or functions that take the pipeline and run
            it once.
        settings: of all prompts and calls, or several, at each of which all are drawn; a call's own arguments come
            before them.
        mode: "first-step", "sampled-steps", "drawn-steps" (from a normal distribution) or "all-steps": which steps make
            the static scales.
        whole: observe all steps in every mode, which an analysis needs, so that the drift can be measured. False
            stops the pipeline after the last step that the mode needs: of a U-Net one step instead of all.

    Raises:
        ValueError: nothing to draw, arguments that the pipeline does not take, an unknown mode, a model that is
            quantized or carries a LoRA, or values that are not finite (naming the layer).
    """
    if mode not in MODES:
        raise ValueError(f"unknown calibration {mode!r}: choose {', '.join(MODES[:-1])} or {MODES[-1]}")
    model = denoiser(pipe)
    check_full_precision(model)
    is_u_net = hasattr(model, "down_blocks")
    last = None if whole or mode != FIRST_STEP or not is_u_net else 0
    observer = RangeObserver(model)
    try:
        trajectory = record_trajectory(pipe, calls, settings, last_step=last, show=show, on_call=observer.at_call)
    finally:
        observer.close()
    by_fold = observer.absmax(trajectory.slots)
    return Calibration(
        mode,
        each_of(settings),
        tuple(calls),
        trajectory,
        {name: absmax.amax(0) for name, absmax in by_fold.items()},
        observer.operations,
        observer.first_tokens(trajectory.slots),
        concatenated_inputs(model, trajectory.calls[0].of_prompts(trajectory.calls[0].prompts[:1])),
        ranges.group_boundaries(trajectory.timesteps()),
        by_fold if len(calls) > 1 else {},
        frozenset() if is_u_net else frozenset(observer.of_vectors),
    )
