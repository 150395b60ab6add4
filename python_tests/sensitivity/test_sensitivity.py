"""Sensitivity is measured, adds up, and finds the layer that was made sensitive."""

import math

import pytest
import torch
from torch import nn

from ldmq_kernels.calibration import SamplingSettings, calibrate
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.numerics.sqnr import relative_noise_power
from ldmq_kernels.planning.plan import Plan, model_record, quantizable_layers
from ldmq_kernels.planning.planner import measure_plan
from ldmq_kernels.sensitivity import analyze
from ldmq_kernels.sensitivity.local_noise import local_candidates
from ldmq_kernels.sensitivity.output_noise import StepNoise, block_of, output_noise, spread_steps, swapped
from python_tests.tiny import PROMPTS, tiny_pipeline

SETTINGS = SamplingSettings(num_inference_steps=2, guidance_scale=4.0)
OUTLIER_LAYER = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
OUTLIER_SOURCE = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"


@pytest.fixture(scope="module")
def outlier_pipe(tmp_path_factory):
    """A pipeline with one feed-forward whose hidden channels differ in size a hundredfold."""
    pipe = tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))
    with torch.no_grad():
        source = pipe.unet.get_submodule(OUTLIER_SOURCE)
        half = source.out_features // 2
        source.weight[:half:32] *= 100
        pipe.unet.get_submodule(OUTLIER_LAYER).weight[:, ::32] /= 100
    return pipe


@pytest.fixture(scope="module")
def analysis(outlier_pipe):
    calibration = calibrate(outlier_pipe, PROMPTS, SETTINGS)
    return analyze(outlier_pipe, calibration, parse_schemes(["w8a8", "w8a16", "fp16"]), analysed_steps=2)


def test_every_layer_is_measured_in_every_scheme_it_can_have(outlier_pipe, analysis):
    names = set(quantizable_layers(outlier_pipe.unet))
    for scheme in ("w8a8-static", "w8a8-dynamic", "w8a16"):
        assert {layer for layer, s in analysis.output if s == scheme} == names
    assert all(noise.mean_power > 0 for noise in analysis.output.values())


def test_the_analysis_leaves_the_model_in_float(outlier_pipe, analysis):
    assert all(type(m) in (nn.Linear, nn.Conv2d) for m in quantizable_layers(outlier_pipe.unet).values())
    noise = output_noise(outlier_pipe.unet, analysis.calibration.trajectory)
    assert noise.mean_power == 0
    assert noise.mean_db == math.inf


def test_weight_only_noise_is_below_that_of_quantized_activations_for_most_layers(analysis):
    names = list(analysis.candidates)
    less = sum(analysis.output[n, "w8a16"].mean_power < analysis.output[n, "w8a8-static"].mean_power for n in names)
    assert less > 0.8 * len(names)


def test_outliers_call_for_smoothing_and_smoothing_helps(outlier_pipe, analysis):
    chosen = analysis.candidate(OUTLIER_LAYER, "w8a8-static")
    assert chosen.alpha is not None
    plain = Plan(model_record(outlier_pipe.unet), [], {OUTLIER_LAYER: {"scheme": "w8a8-static"}})
    absmax = analysis.calibration.input_absmax(OUTLIER_LAYER)
    plain.input_scales[OUTLIER_LAYER] = float(absmax.amax()) / 127
    unsmoothed = measure_plan(outlier_pipe.unet, plain, analysis.calibration.trajectory)
    assert analysis.output[OUTLIER_LAYER, "w8a8-static"].mean_power < 0.5 * unsmoothed.mean_power


def test_noise_powers_of_layers_add_up_to_that_of_all_together(outlier_pipe, analysis):
    names = list(analysis.candidates)
    together = Plan(model_record(outlier_pipe.unet), [{"pattern": "*", "scheme": "w8a8-dynamic"}])
    for name in names:
        candidate = analysis.candidate(name, "w8a8-dynamic")
        if candidate.smoothing is not None:
            together.smoothing[name] = candidate.smoothing
    whole = measure_plan(outlier_pipe.unet, together, analysis.calibration.trajectory).mean_power
    added = sum(analysis.output[name, "w8a8-dynamic"].mean_power for name in names)
    assert abs(10 * math.log10(added / whole)) < 2


def test_a_block_is_noisier_than_its_quietest_layer(analysis):
    for (block, scheme), noise in analysis.blocks.items():
        layers = [p.mean_power for (name, s), p in analysis.output.items() if s == scheme and block_of(name) == block]
        assert noise.mean_power > 0.5 * min(layers)


def test_local_noise_is_that_of_the_layer_on_its_own(outlier_pipe, analysis):
    name = "conv_out"
    scheme = parse_schemes(["w8a16"])
    found = local_candidates(outlier_pipe.unet, analysis.calibration, scheme, [0, 1])[name][0]
    layer = outlier_pipe.unet.conv_out
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    output_noise(outlier_pipe.unet, analysis.calibration.trajectory)
    handle.remove()
    from ldmq_kernels.nn import QuantConv2d

    quantized = QuantConv2d.from_float(layer, scheme[0])
    with torch.no_grad():
        exact = torch.cat([layer(x) for x in inputs])
        test = torch.cat([quantized(x) for x in inputs])
    assert found.noise == pytest.approx(relative_noise_power(exact, test), rel=1e-3)


def test_swapped_layers_come_back_after_an_error(outlier_pipe):
    original = outlier_pipe.unet.conv_in
    with pytest.raises(KeyboardInterrupt), swapped(outlier_pipe.unet, {"conv_in": nn.Identity()}):
        raise KeyboardInterrupt
    assert outlier_pipe.unet.conv_in is original


def test_mean_of_decibels_is_not_decibels_of_the_mean():
    noise = StepNoise({0: 1e-3, 1: 1e-5})
    assert noise.mean_db == pytest.approx(40.0)
    assert noise.mean_power == pytest.approx(5.05e-4)


@pytest.mark.parametrize(("steps", "count", "expected"), [(20, 4, [0, 6, 13, 19]), (3, 4, [0, 1, 2]), (9, 1, [0])])
def test_analysed_steps_spread_over_the_trajectory(steps, count, expected):
    assert spread_steps(steps, count) == expected


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("conv_in", "conv_in"),
        ("time_embedding.linear_1", "time_embedding"),
        ("down_blocks.0.resnets.1.conv1", "down_blocks.0.resnets.1"),
        ("down_blocks.0.downsamplers.0.conv", "down_blocks.0.downsamplers.0"),
        ("mid_block.attentions.0.proj_in", "mid_block.attentions.0"),
        ("up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2", "up_blocks.1.attentions.2"),
    ],
)
def test_blocks_are_residual_blocks_transformers_and_samplers(layer, block):
    assert block_of(layer) == block
