"""Plans of this package for the benchmarks: uniform ones, plain or searched, on given layers, and planned ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from benchmarks.study.evaluation import Setup, with_unet
from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.ranges import ALL_STEPS, static_scale
from ldmq_kernels.calibration.settings import recorded
from ldmq_kernels.conversion import quantize
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.nn.kinds import kind_of
from ldmq_kernels.numerics.formats import FLOAT, SCHEMES, Scheme, parse_schemes
from ldmq_kernels.numerics.smoothing import smoothing_vector, weight_absmax
from ldmq_kernels.planning.session import Session
from ldmq_kernels.planning.target import Target
from ldmq_kernels.plans.cost import layer_bytes
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan, Plan, model_record
from ldmq_kernels.sensitivity.analysis import Analysis, analyze
from ldmq_kernels.sensitivity.candidates import Method

Choices = dict[str, LayerPlan]
LISTED = ("w8a8-static", "fp16")  # what published lists of layers choose between
WEIGHT_ONLY = LayerPlan(SCHEMES["w8a16"])
UNCHANGED = LayerPlan(FLOAT)


def quantized(setup: Setup, plan: Plan) -> nn.Module:
    """A copy of the float UNet quantized as a plan says."""
    model = copy.deepcopy(setup.unet)
    with_unet(setup.pipe, model, lambda: quantize(setup.pipe, plan))
    return model


def twice_computed(model: nn.Module, setup: Setup) -> str:
    """How much of a model has split activations, in words; nothing where none has."""
    operations = setup.calibration.operations
    split = [
        name
        for name, layer in model.named_modules()
        if name in operations and isinstance(layer, QuantizedLayer) and layer.scheme.is_split
    ]
    share = sum(operations[name] for name in split) / sum(operations.values())
    return f"{len(split)} layers split, {share:.1%} of operations" if split else ""


def plan_of(model: nn.Module, choices: Mapping[str, LayerPlan], calibration: Calibration) -> Plan:
    """A plan that says of each layer what `choices` do; a layer that is not among them stays in float."""
    plan = Plan(model_record(model), [], timestep_groups=list(calibration.timestep_groups))
    plan.calibration = {
        "mode": calibration.mode,
        "prompts": len(calibration.calls),
        "texts": list(calibration.calls),
        **recorded(calibration.settings),
    }
    for name, choice in choices.items():
        plan.set(name, choice)
    return plan


def plan_bytes(model: nn.Module, plan: Plan) -> int:
    """Bytes of the weights of all linears and convolutions: what a target in bytes limits."""
    layers = quantizable_layers(model)
    return sum(layer_bytes(layers[name], choice) for name, choice in plan.layers(model).items())


def on_layers(choices: Choices, stored: Collection[str], computed: Collection[str]) -> Choices:
    """The same choices on the layers that another tool computes in 8 bits, weights alone where it only stores them."""
    return {
        name: choice if name in computed else WEIGHT_ONLY if name in stored else UNCHANGED
        for name, choice in choices.items()
    }


class OwnPlans:
    """Makes plans on one setup; each search and each analysis is made once."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.layers = quantizable_layers(setup.unet)

    def calibration(self, mode: str) -> Calibration:
        """The setup's, with another mode."""
        return replace(self.setup.calibration, mode=mode)

    @functools.cached_property
    def whole(self) -> Calibration:
        """Calibrated on all steps and on all tokens."""
        return self.calibration(ALL_STEPS).with_first_token()

    def _fitting(self, scheme: Scheme) -> Iterator[str]:
        for name in self.setup.calibration.absmax:
            if kind_of(self.layers[name]) in scheme.format.layers:
                yield name

    # -- uniform ------------------------------------------------------------------------------------------

    def plain(
        self, scheme: str, mode: str = ALL_STEPS, *, rounding: str = "nearest", alpha: float | None = None
    ) -> Plan:
        """One scheme everywhere: the whole calibrated range, nothing searched.

        Args:
            alpha: SmoothQuant's strength for every layer; None smooths nothing.
        """
        calibration = self.calibration(mode).with_first_token()
        return plan_of(self.setup.unet, self.plain_choices(scheme, calibration, rounding, alpha), calibration)

    def plain_choices(
        self, scheme: str, calibration: Calibration, rounding: str = "nearest", alpha: float | None = None
    ) -> Choices:
        """What `plain` says of each layer; one whose input is zero in calibration stays in float."""
        made = SCHEMES[scheme]
        choices = {}
        for name in self._fitting(made):
            smoothing = None if alpha is None else self._smoothing(name, calibration, alpha)
            groups = calibration.grouped_absmax(name) if made.has_timestep_scales else [calibration.input_absmax(name)]
            scales = [static_scale(absmax, smoothing, made) for absmax in groups]
            known = [scale for scale in scales if scale is not None]
            if made.is_static and not known:
                choices[name] = UNCHANGED
                continue
            each = tuple(max(known) if scale is None else scale for scale in scales) if made.is_static else ()
            scale = None if not made.is_static else each if made.has_timestep_scales else each[0]
            choices[name] = LayerPlan(made, "", scale, smoothing, rounding=rounding)
        return choices

    def _smoothing(self, name: str, calibration: Calibration, alpha: float) -> Tensor | None:
        layer = self.layers[name]
        if getattr(layer, "groups", 1) != 1:
            return None
        return 1 / smoothing_vector(
            calibration.input_absmax(name), weight_absmax(layer.weight.detach().movedim(1, -1)), alpha
        )

    def searched(self, scheme: str, mode: str = ALL_STEPS, method: Method | None = None) -> Plan:
        """One scheme everywhere, each layer with what the search finds for it."""
        calibration = self.calibration(mode)
        return plan_of(self.setup.unet, self.searched_choices(scheme, mode, method), calibration)

    @functools.cache  # noqa: B019 - there is one of these in a run
    def searched_choices(self, scheme: str, mode: str = ALL_STEPS, method: Method | None = None) -> Choices:
        """What `searched` says of each layer."""
        calibration = self.calibration(mode)
        found = analyze(self.setup.pipe, calibration, [SCHEMES[scheme]], exact=0, method=method or Method())
        return {name: each[0].layer_plan if each else UNCHANGED for name, each in found.candidates.items()}

    # -- planned ------------------------------------------------------------------------------------------

    @functools.cached_property
    def analysis(self) -> Analysis:
        """The analysis of the schemes that published lists choose among, with all signals."""
        calibration = self.calibration(ALL_STEPS)
        return analyze(self.setup.pipe, calibration, parse_schemes(LISTED), signals=("sqnr", "ssim"))

    def planned(self, budget: int, signals: Sequence[str] = ("sqnr",)) -> Plan:
        """The plan of highest SQNR (or of several signals together) within a budget of bytes, of `LISTED` schemes."""
        unet, held_out = self.setup.unet, self.setup.held_out
        return Session(unet, self.analysis, held_out, LISTED, signals=tuple(signals)).plan(Target(bytes=budget)).plan


@functools.cache
def own_plans(setup: Setup) -> OwnPlans:
    """The plans of a setup, made once."""
    return OwnPlans(setup)
