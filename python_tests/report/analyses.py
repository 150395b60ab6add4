"""An analysis of the small UNet with made-up noise, for tests of what shows it."""

from __future__ import annotations

import torch
from torch import nn

from ldmq_kernels.calibration import Calibration, SamplingSettings, Trajectory
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.planning.planner import PlanResult
from ldmq_kernels.plans.blocks import block_of
from ldmq_kernels.plans.layers import layer_shape, quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan, Plan, model_record
from ldmq_kernels.sensitivity.analysis import Analysis
from ldmq_kernels.sensitivity.candidates import LayerCandidate
from ldmq_kernels.sensitivity.output_noise import StepNoise

STEPS = [0, 3, 7]
TRIED = ("w8a8-static", "w8a8-dynamic", "w8a16")


def made_up_analysis(model: nn.Module) -> Analysis:
    """Noise that grows with the layer's index and shrinks with the scheme's; the first layer has none in w8a16."""
    layers = quantizable_layers(model)
    calibration = Calibration(
        "first-step",
        (SamplingSettings(8, 4.0, 0),),
        ("a prompt",),
        Trajectory([], torch.zeros(1, 4, 8, 8), 8),
        {name: torch.rand(8, layer_shape(layer)[1]) + 0.5 for name, layer in layers.items()},
        dict.fromkeys(layers, 1000),
    )
    output, candidates = {}, {}
    for index, name in enumerate(layers):
        candidates[name] = [
            LayerCandidate(LayerPlan(SCHEMES[scheme], "", 0.1), 1e-5, "alpha 0.5" if index % 4 == 0 else "plain")
            for scheme in TRIED
        ]
        for rank, scheme in enumerate(TRIED):
            power = 0.0 if index == 0 and scheme == "w8a16" else 1e-6 * (index + 1) / 10**rank
            output[name, scheme] = StepNoise({step: power * (step + 1) for step in STEPS})
    blocks = {(block_of(model, name), scheme): noise for (name, scheme), noise in output.items()}
    return Analysis(calibration, STEPS, candidates, output, blocks)


def made_up_result(model: nn.Module) -> PlanResult:
    """All layers in w8a16 but the first."""
    first = next(iter(quantizable_layers(model)))
    plan = Plan(
        model_record(model),
        [{"pattern": "*", "scheme": "w8a16"}],
        {first: {"scheme": "fp16", "reason": "even w8a16 alone is <too noisy>"}},
        target={"sqnr_db": 41.5},
        measured={"held_out_sqnr_db": 42.25, "predicted_sqnr_db": 41.75},
    )
    return PlanResult(plan, made_up_analysis(model), StepNoise(dict.fromkeys(range(8), 0.0001)), 41.75)
