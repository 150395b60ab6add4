"""What a plan's calibrated ranges cut off where a pipeline is used in another way than the plan was made for.

The float pipeline draws once; on the way every layer that has a static, split or timestep scale is told how much of
its input lies beyond the range of that scale, and what that does to the input's SQNR. Nothing is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.calibrate import check_full_precision
from ldmq_kernels.calibration.denoisers import chosen, denoiser
from ldmq_kernels.calibration.drawings import Call, given_calls
from ldmq_kernels.calibration.ranges import group_of
from ldmq_kernels.calibration.settings import SamplingSettings, Settings, changed, each_of, of_record, recorded
from ldmq_kernels.calibration.trajectory import Trajectory, record_trajectory, timestep_of
from ldmq_kernels.nn.kinds import axes_of
from ldmq_kernels.numerics.split import LOW_STEPS
from ldmq_kernels.numerics.sqnr import to_db
from ldmq_kernels.plans.layers import layer_input, quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan, Plan

CLIPS_DB = 1.0  # of the input's SQNR, from which a range is said to clip: less, a search may have found worth it


@dataclass(frozen=True)
class LayerClipping:
    """How one layer's calibrated range fits its inputs.

    Attributes:
        share: of the input's values that lie beyond the range.
        largest: the largest value over the range's end, by timestep group; one number for a static or split scale, 0
            for a group that no call was in.
        sqnr_db: of the input as it is quantized, in dB.
        unclipped_db: of the input as the same step of integers without an end would quantize it.
    """

    layer: str
    scheme: str
    share: float
    largest: tuple[float, ...]
    sqnr_db: float
    unclipped_db: float

    @property
    def lost_db(self) -> float:
        """What the end of the range costs the input, in dB of SQNR."""
        return self.unclipped_db - self.sqnr_db

    @property
    def clips(self) -> bool:
        """Whether that is worth another scale."""
        return self.lost_db >= CLIPS_DB


@dataclass(frozen=True)
class Clipping:
    """How a plan's calibrated ranges fit what was drawn.

    Attributes:
        layers: all that have a calibrated scale and were run, the one that loses most first.
        settings: that everything was drawn at.
        trajectory: of the float pipeline.
    """

    layers: list[LayerClipping]
    settings: tuple[SamplingSettings, ...]
    trajectory: Trajectory = field(repr=False, compare=False)

    @property
    def clipped(self) -> list[LayerClipping]:
        """The layers whose ranges clip."""
        return [layer for layer in self.layers if layer.clips]


class _Sums:
    """What is added up of one layer's inputs, in float64."""

    def __init__(self, groups: int) -> None:
        self.values, self.beyond = 0, 0
        self.signal, self.noise, self.unclipped = 0.0, 0.0, 0.0
        self.largest = [0.0] * groups

    def add(self, y: Tensor, scale: float, group: int, layer_plan: LayerPlan) -> None:
        """One input, as it is smoothed: float32 of any shape."""
        if not y.numel():
            return
        largest = layer_plan.scheme.activations.largest
        step = scale / LOW_STEPS if layer_plan.scheme.is_split else scale
        end = largest * scale + (step * largest if layer_plan.scheme.is_split else 0.0)
        rounding = (y / step).round_().mul_(step).sub_(y)
        error = torch.where(y.abs() > end, y.abs() - end, rounding)
        self.values += y.numel()
        self.beyond += int((y.abs() > end + step / 2).sum())
        self.signal += float(y.double().square().sum())
        self.noise += float(error.double().square().sum())
        self.unclipped += float(rounding.double().square().sum())
        self.largest[group] = max(self.largest[group], float(y.abs().amax()) / end)

    def found(self, layer: str, scheme: str) -> LayerClipping:
        """The layer's figures."""
        decibels = [to_db(noise / self.signal) if self.signal else 200.0 for noise in (self.noise, self.unclipped)]
        decibels = [min(db, 200.0) for db in decibels]
        return LayerClipping(layer, scheme, self.beyond / max(1, self.values), tuple(self.largest), *decibels)


class ClippingObserver:
    """Hooks on the layers of a float model whose inputs a plan would quantize with calibrated scales.

    Args:
        model: in full precision, that the plan is for.

    Raises:
        PlanError: the plan does not fit the model.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._boundaries, self._group = plan.timestep_groups, 0
        self._watched = {name: p for name, p in plan.layers(model).items() if p.scheme.is_static}
        self._sums = {name: _Sums(len(p.scales)) for name, p in self._watched.items()}
        layers = quantizable_layers(model)
        self._handles = [
            layers[name].register_forward_pre_hook(self._hook(name), with_kwargs=True) for name in self._sums
        ]
        self._handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._group = group_of(timestep_of(args, kwargs), self._boundaries)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        layer_plan, sums = self._watched[name], self._sums[name]

        def observe(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            y = layer_input(args, kwargs).detach().float()
            if layer_plan.first_token and y.dim() == 3:
                y = y[:, 1:]
            if layer_plan.smoothing is not None:
                y = y * layer_plan.smoothing.to(y.device).reshape(-1, *[1] * axes_of(layer))
            group = min(self._group, len(layer_plan.scales) - 1)
            sums.add(y, layer_plan.scales[group], group, layer_plan)

        return observe

    def found(self) -> list[LayerClipping]:
        """Every layer with a calibrated scale, the one that loses most first; without those that were never run."""
        each = [sums.found(name, str(self._watched[name].scheme)) for name, sums in self._sums.items() if sums.values]
        return sorted(each, key=lambda one: -one.lost_db)

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def clipping(
    pipe: Any,
    plan: Plan,
    prompts: Sequence[str] | str | None = None,
    *,
    calls: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    settings: Sequence[Mapping[str, Any]] = ({},),
    show_progress: bool = True,
) -> Clipping:
    """Find which layers' calibrated ranges clip where a pipeline is used in another way than the plan was made for.

        found = ldmq.clipping(pipe, plan, prompts, settings=[dict(guidance_scale=12.0), dict(num_inference_steps=4)])
        plan = ldmq.unclip(plan, found)

    The float pipeline draws everything once at each of the settings; nothing is quantized.

    Args:
        pipe: a diffusers pipeline in full precision, that the plan is for.
        prompts: texts; or `calls`, arguments of the pipeline's own call, each a mapping.
        settings: what differs from the settings that the plan was made at: any of num_inference_steps, guidance_scale,
            seed, height, width and scheduler, the name of a class of diffusers.

    Raises:
        PlanError: the plan does not fit the model.
        ValueError: nothing to draw, unknown settings, arguments that the pipeline does not take, a quantized model.
    """
    drawn = given_calls(prompts, calls, None)
    base = of_record(plan.calibration)[0]
    return observe_clipping(pipe, plan, drawn, changed(base, settings), show=show_progress)


@torch.no_grad()
def observe_clipping(pipe: Any, plan: Plan, calls: Sequence[Call], settings: Settings, *, show: bool) -> Clipping:
    """Do what `clipping` does, at settings that are given in full.

    Raises:
        PlanError: the plan does not fit the model.
        ValueError: as `clipping`.
    """
    pipe = chosen(pipe, plan.model.get("part"))
    check_full_precision(denoiser(pipe))
    observer = ClippingObserver(denoiser(pipe), plan)
    try:
        trajectory = record_trajectory(pipe, calls, settings, show=show)
    finally:
        observer.close()
    return Clipping(observer.found(), each_of(settings), trajectory)


def unclip(plan: Plan, found: Clipping) -> Plan:
    """Mend a plan where its ranges clip: such a layer measures its scale in each call, a split one gets a wider range.

    A split activation has no scheme with a measured scale, and steps so fine that a wider range costs it little. Layers
    that do not clip stay as they are. What the plan says of its measurements is left out: they were of other scales.

    Args:
        found: of this plan, see `clipping`; the new plan says at which settings.

    Returns:
        A new plan; `plan` stays as it is.
    """
    mended = replace(
        plan,
        exceptions=dict(plan.exceptions),
        input_scales=dict(plan.input_scales),
        smoothing=dict(plan.smoothing),
        bias_correction=dict(plan.bias_correction),
        details=dict(plan.details),
        calibration=dict(plan.calibration),
        measured={},
    )
    for layer in found.clipped:
        mended.set(layer.layer, _unclipped(plan.layer(layer.layer), max(layer.largest)))
    mended.calibration["unclipped"] = {"layers": [layer.layer for layer in found.clipped], **recorded(found.settings)}
    return mended


def _unclipped(layer_plan: LayerPlan, largest: float) -> LayerPlan:
    """A layer's plan without the end of its range, beyond which it met values `largest` times as large."""
    dynamic = layer_plan.scheme.with_activations("dynamic")
    if layer_plan.scheme.is_split or dynamic is None:
        scales = tuple(scale * largest for scale in layer_plan.scales)
        scale = scales if isinstance(layer_plan.input_scale, tuple) else scales[0]
        return replace(layer_plan, input_scale=scale, reason=f"{layer_plan.reason}; range widened {largest:.2f}x")
    reason = f"{layer_plan.reason}; measured scale, its range clipped {largest:.2f}x"
    return replace(layer_plan, scheme=dynamic, input_scale=None, bias_correction=None, reason=reason)
