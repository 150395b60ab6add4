"""The contenders of benchmarks/rivals.py: each tool, set to quantize all the layers that it can.

What each one does was read in its source (SDNQ 0.2.8, torchao 0.18.0, optimum-quanto 0.2.7):
SDNQ leaves out convolutions, small layers and layers of certain names unless told otherwise, and
multiplies in float where a convolution has fewer than 32 channels or a linear fewer than 32 rows.
torchao has no integer convolution. optimum-quanto restores its convolution weights to float in
each call, and scales its activations statically, by a moving average over the calibration run.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import ldmq_kernels
from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.ranges import ALL_STEPS, FIRST_STEP, static_scale
from ldmq_kernels.calibration.trajectory import Trajectory, denoiser
from ldmq_kernels.conversion import convert
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.planning.plan import Plan, model_record, quantizable_layers, uniform_plan
from ldmq_kernels.planning.planner import DEFAULT_FORMATS, Target, plan_from_analysis
from ldmq_kernels.report.measure import draw_pictures
from ldmq_kernels.sensitivity.analysis import Analysis, analyze

OURS = "ldmq_kernels"
PLANNED_DB = (36.0, 38.0, 40.0)


@dataclass(frozen=True)
class Workbench:
    """The float pipeline and what was recorded of it, on captions that nothing is measured on."""

    pipe: Any
    calibration: Calibration
    held_out: Trajectory

    @property
    def unet(self) -> nn.Module:
        """The float UNet."""
        return denoiser(self.pipe)


@dataclass(frozen=True)
class Contender:
    """One way to quantize: `build` gives a quantized copy of the workbench's UNet."""

    tool: str
    configuration: str
    build: Callable[[Workbench], nn.Module]
    note: str = ""

    @property
    def version(self) -> str:
        """Of the installed package.

        Raises:
            PackageNotFoundError: it is not installed.
        """
        return ldmq_kernels.__version__ if self.tool == OURS else importlib.metadata.version(self.tool)


# -- SDNQ ------------------------------------------------------------------------------------------------


def _sdnq(bench: Workbench, **settings: Any) -> nn.Module:
    from sdnq.quantizer import sdnq_post_load_quant

    return sdnq_post_load_quant(copy.deepcopy(bench.unet), weights_dtype="int8", **settings)


def _sdnq_everywhere(bench: Workbench) -> nn.Module:
    return _sdnq(
        bench,
        quant_conv=True,
        use_quantized_matmul=True,
        use_quantized_matmul_conv=True,
        minimum_allowed_numel=0,
        minimum_allowed_channel_size=0,
        add_skip_keys=False,
    )


# -- torchao ---------------------------------------------------------------------------------------------


def _torchao(bench: Workbench, configuration: str) -> nn.Module:
    from torchao import quantization

    model = copy.deepcopy(bench.unet)
    quantization.quantize_(model, getattr(quantization, configuration)())
    return model


# -- optimum-quanto --------------------------------------------------------------------------------------


def _quanto_weights(bench: Workbench) -> nn.Module:
    from optimum import quanto

    model = copy.deepcopy(bench.unet)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def _quanto_calibrated(bench: Workbench) -> nn.Module:
    from optimum import quanto

    model = copy.deepcopy(bench.unet)
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8)
    original = bench.unet
    bench.pipe.unet = model
    try:
        with quanto.Calibration(), torch.no_grad():
            draw_pictures(bench.pipe, bench.calibration.prompts, bench.calibration.settings, "calibration")
    finally:
        bench.pipe.unet = original
    quanto.freeze(model)
    return model


def rivals() -> list[Contender]:
    """The other tools, each with all the layers that it can quantize, and as it comes."""
    return [
        Contender("sdnq", "w8a8 dynamic, everywhere", _sdnq_everywhere, "one scale a token or patch"),
        Contender("sdnq", "as it comes", _sdnq, "weight-only"),
        Contender("torchao", "w8a8 dynamic", lambda b: _torchao(b, "Int8DynamicActivationInt8WeightConfig")),
        Contender("torchao", "weight-only", lambda b: _torchao(b, "Int8WeightOnlyConfig")),
        Contender("optimum-quanto", "w8a8 calibrated", _quanto_calibrated, "rounds some outputs too"),
        Contender("optimum-quanto", "weight-only", _quanto_weights),
    ]


# -- this package ----------------------------------------------------------------------------------------


def converted(bench: Workbench, plan: Plan) -> nn.Module:
    """A copy of the float UNet quantized as a plan says."""
    model = copy.deepcopy(bench.unet)
    convert(model, plan)
    return model


def _static_scales(bench: Workbench, mode: str) -> dict[str, float]:
    calibration = replace(bench.calibration, mode=mode)
    scales = {name: static_scale(calibration.input_absmax(name), None) for name in calibration.absmax}
    return {name: scale for name, scale in scales.items() if scale is not None}


def _uniform_static(bench: Workbench, mode: str) -> nn.Module:
    rules = [{"pattern": "*", "scheme": "w8a8-static"}]
    return converted(bench, Plan(model_record(bench.unet), rules, input_scales=_static_scales(bench, mode)))


def own_uniform() -> list[Contender]:
    """This package with one scheme for every layer."""

    def uniform(scheme: str) -> Callable[[Workbench], nn.Module]:
        return lambda bench: converted(bench, uniform_plan(bench.unet, scheme))

    return [
        Contender(OURS, "w8a8 dynamic", uniform("w8a8-dynamic")),
        Contender(OURS, "w8a8 static, first step", lambda b: _uniform_static(b, FIRST_STEP)),
        Contender(OURS, "w8a8 static, all steps", lambda b: _uniform_static(b, ALL_STEPS)),
        Contender(OURS, "weight-only", uniform("w8a16")),
    ]


def own_beside(
    rival: Contender, stored: Iterable[str], computed: Iterable[str], scheme: str = "w8a8-dynamic"
) -> Contender:
    """This package on exactly the layers that a rival quantizes, in the rival's kind of arithmetic."""
    computed, stored = frozenset(computed), frozenset(stored)

    def build(bench: Workbench) -> nn.Module:
        exceptions = {
            name: {"scheme": "w8a16" if name in stored else "fp16", "reason": f"as {rival.tool} does"}
            for name in quantizable_layers(bench.unet)
            if name not in computed
        }
        scales = _static_scales(bench, ALL_STEPS) if scheme == "w8a8-static" else {}
        plan = Plan(model_record(bench.unet), [{"pattern": "*", "scheme": scheme}], exceptions, scales)
        return converted(bench, plan)

    kind = scheme.replace("-", " ").replace("static", "static, all steps")
    return Contender(OURS, f"{kind}, layers of {rival.tool}", build)


def own_planned(*, show: bool) -> list[Contender]:
    """This package's plans of fewest bytes for some targets; they share one analysis."""
    analyses: list[Analysis] = []

    def planned(target: float) -> Callable[[Workbench], nn.Module]:
        def build(bench: Workbench) -> nn.Module:
            if not analyses:
                schemes = parse_schemes(DEFAULT_FORMATS)
                analyses.append(analyze(bench.pipe, bench.calibration, schemes, show=show))
            found = plan_from_analysis(bench.unet, analyses[0], bench.held_out, Target(target), DEFAULT_FORMATS)
            return converted(bench, found.plan)

        return build

    return [Contender(OURS, f"planned for {target:g} dB", planned(target)) for target in PLANNED_DB]
