"""Sensitivity is measured, adds up, and finds the layer that was made sensitive."""

import copy
import math

import pytest
import torch
from scipy import stats
from torch import nn

from ldmq_kernels.calibration import SamplingSettings, calibrate
from ldmq_kernels.calibration.ranges import spread_steps
from ldmq_kernels.conversion import convert
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.plans.blocks import block_of
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan, model_record, uniform_plan
from ldmq_kernels.sensitivity import analyze
from ldmq_kernels.sensitivity.analysis import analysed_part, cross_validated_noise
from ldmq_kernels.sensitivity.output_noise import StepNoise, output_noise, pooled, summed, swapped
from python_tests.tiny import PROMPTS, SHALLOW, tiny_pipeline

SETTINGS = SamplingSettings(num_inference_steps=2, guidance_scale=4.0)
OUTLIER_LAYER = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
OUTLIER_SOURCE = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"


def noise_of_plan(model: nn.Module, plan: Plan, trajectory) -> StepNoise:
    quantized = copy.deepcopy(model)
    convert(quantized, plan)
    return output_noise(quantized, trajectory)


@pytest.fixture(scope="module")
def outlier_pipe(tmp_path_factory):
    """A pipeline with one feed-forward whose hidden channels differ in size a hundredfold."""
    pipe = tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), **SHALLOW)
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
    for scheme in ("w8a8-static", "w8a8-timestep", "w8a8-dynamic", "w8a16"):
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
    assert chosen.layer_plan.smoothing is not None
    assert chosen.label.startswith("alpha")
    plain = Plan(model_record(outlier_pipe.unet), [], {OUTLIER_LAYER: {"scheme": "w8a8-static"}})
    absmax = analysis.calibration.input_absmax(OUTLIER_LAYER)
    plain.input_scales[OUTLIER_LAYER] = float(absmax.amax()) / 127
    unsmoothed = noise_of_plan(outlier_pipe.unet, plain, analysis.calibration.trajectory)
    assert analysis.output[OUTLIER_LAYER, "w8a8-static"].mean_power < 0.5 * unsmoothed.mean_power


def test_noise_powers_of_layers_add_up_to_that_of_all_together(outlier_pipe, analysis):
    names = list(analysis.candidates)
    together = Plan(model_record(outlier_pipe.unet), [{"pattern": "*", "scheme": "w8a8-dynamic"}])
    for name in names:
        together.set(name, analysis.candidate(name, "w8a8-dynamic").layer_plan)
    whole = noise_of_plan(outlier_pipe.unet, together, analysis.calibration.trajectory)
    added = summed(analysis.output[name, "w8a8-dynamic"] for name in names)
    assert set(added.by_step) == set(whole.by_step)
    assert abs(10 * math.log10(added.mean_power / whole.mean_power)) < 2


def test_a_block_is_noisier_than_its_quietest_layer(outlier_pipe, analysis):
    unet = outlier_pipe.unet
    for (block, scheme), noise in analysis.blocks.items():
        inside = [name for name, s in analysis.output if s == scheme and block_of(unet, name) == block]
        layers = [analysis.output[name, scheme].mean_power for name in inside]
        assert noise.mean_power > 0.5 * min(layers)


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


def test_probes_estimate_what_runs_measure(analysis):
    """Both are noisy for one layer; over all, the ranking and the total agree."""
    keys = [key for key in analysis.output if key in analysis.estimates]
    assert len(keys) == len(analysis.output)
    exact = [analysis.output[key].mean_power for key in keys]
    estimated = [analysis.estimates[key].mean_power for key in keys]
    assert stats.spearmanr(exact, estimated).statistic > 0.9
    assert abs(10 * math.log10(sum(estimated) / sum(exact))) < 1.5


def test_only_as_many_candidates_are_run_as_asked_for(outlier_pipe, analysis):
    few = analyze(outlier_pipe, analysis.calibration, parse_schemes(["w8a8"]), analysed_steps=2, exact=5)
    assert len(few.exact) == 5
    rest = [few.output[key].mean_power for key in few.output if key not in few.exact]
    assert max(rest) <= min(few.estimates[key].mean_power for key in few.exact)
    assert all(few.output[key] == few.estimates[key] for key in few.output if key not in few.exact)


def test_every_prompt_and_half_is_kept_apart_and_adds_up(analysis):
    noise = analysis.output["conv_out", "w8a8-static"]
    halves = [s for s in noise.samples if s.part in ("unconditional", "conditional")]
    assert {(s.step, s.prompt, s.part) for s in noise.samples} == {
        (step, prompt, part)
        for step in noise.by_step
        for prompt in range(len(PROMPTS))
        for part in ("unconditional", "conditional", "guided")
    }
    for step, power in noise.by_step.items():
        mine = [s for s in halves if s.step == step]
        assert sum(s.noise for s in mine) / sum(s.signal for s in mine) == pytest.approx(power, rel=1e-5)


def test_an_unknown_signal_and_a_wrong_number_of_runs_are_refused(outlier_pipe, analysis):
    with pytest.raises(ValueError, match="unknown signal 'lpips'"):
        analyze(outlier_pipe, analysis.calibration, parse_schemes(["w8a8"]), signals=("sqnr", "lpips"))
    with pytest.raises(ValueError, match="choose 'all', 'auto' or a number"):
        analyze(outlier_pipe, analysis.calibration, parse_schemes(["w8a8"]), exact="some")


def test_structural_noise_is_measured_of_cross_attention_and_feed_forward(outlier_pipe, analysis):
    found = analyze(
        outlier_pipe, analysis.calibration, parse_schemes(["w4a8-dynamic"]), analysed_steps=1, signals=("ssim",)
    ).signals["ssim"]
    names = set(quantizable_layers(outlier_pipe.unet))
    assert {name for name, _ in found} == {n for n in names if ".attn2." in n or ".ff." in n}
    assert max(found.values()) > 1e-6  # 0 for a layer whose noise is below that of float32
    assert all(-1e-6 < value < 1 for value in found.values())


def test_folds_that_are_run_apart_pool_to_the_noise_of_one_run(outlier_pipe, analysis):
    calibration = analysis.calibration
    model = copy.deepcopy(outlier_pipe.unet)
    convert(model, uniform_plan(model, "w8a8-dynamic"))
    whole = output_noise(model, calibration.trajectory, by_sample=True)
    parts = [output_noise(model, part, by_sample=True) for part in calibration.trajectory.by_fold().values()]
    assert len(parts) == 2
    together = pooled(parts)
    assert len(together.samples) == len(whole.samples)
    for step, power in whole.by_step.items():
        assert together.by_step[step] == pytest.approx(power, rel=0.05)


def test_layers_run_alone_have_the_noise_of_whole_runs(outlier_pipe, analysis):
    found = analyze(outlier_pipe, analysis.calibration, parse_schemes(["w8a8-timestep"]), analysed_steps=2, exact=3)
    assert len(found.exact) == 3
    folds = analysed_part(analysis.calibration.trajectory, found.steps, 2).by_fold()
    for name, scheme in found.exact:
        chosen = {name: found.candidate(name, scheme)}
        whole = cross_validated_noise(outlier_pipe.unet, chosen, folds, analysis.calibration)
        assert found.output[name, scheme].by_step == whole.by_step
        assert found.output[name, scheme].samples == whole.samples
