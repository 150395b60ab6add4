"""Calibration sees what the float pipeline feeds each layer, and changes nothing."""

import numpy as np
import pytest
import torch
from torch import nn

from ldmq_kernels.calibration import SamplingSettings, calibrate
from ldmq_kernels.calibration.ranges import (
    channel_absmax,
    drawn_steps,
    group_boundaries,
    group_of,
    grouped_absmax,
    range_drift,
    static_scale,
)
from ldmq_kernels.calibration.trajectory import replay
from ldmq_kernels.conversion import convert
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import uniform_plan
from python_tests.breadth.matrix import all_rows
from python_tests.tiny import PROMPTS

SETTINGS = SamplingSettings(num_inference_steps=3, guidance_scale=4.0, seed=5)


@pytest.fixture(scope="module")
def calibration(shared_pipe):
    return calibrate(shared_pipe, PROMPTS, SETTINGS)


def test_every_layer_has_ranges_for_every_step_and_channel(shared_pipe, calibration):
    layers = quantizable_layers(shared_pipe.unet)
    assert set(calibration.absmax) == set(layers)
    for name, layer in layers.items():
        assert calibration.absmax[name].shape == (3, layer.weight.shape[1])
        assert (calibration.absmax[name].amax(1) > 0).all()


def test_the_first_layer_saw_the_latents_of_each_step(calibration):
    for call in calibration.trajectory.calls:
        expected = call.args[0].abs().amax((0, 2, 3))
        assert torch.allclose(calibration.absmax["conv_in"][call.step], expected)


def test_single_step_calibration_uses_the_noisiest_step_alone(shared_pipe, calibration):
    all_steps = calibrate(shared_pipe, PROMPTS, SETTINGS, mode="all-steps")
    for name, by_step in calibration.absmax.items():
        assert torch.equal(calibration.input_absmax(name), by_step[0])
        assert torch.equal(all_steps.input_absmax(name), by_step.amax(0))


def test_replaying_the_trajectory_gives_the_recorded_outputs(shared_pipe, calibration):
    for call, output in replay(shared_pipe.unet, calibration.trajectory):
        assert torch.equal(output, call.output)


def test_each_fold_of_the_prompts_has_its_own_ranges(shared_pipe, calibration):
    folds = calibration.trajectory.by_fold()
    assert {fold: part.prompts for fold, part in folds.items()} == {0: [0], 1: [1]}
    for fold, part in folds.items():
        for call in part.calls:
            seen = call.args[0].abs().amax((0, 2, 3))
            assert torch.allclose(calibration.absmax_by_fold["conv_in"][fold, call.step], seen)
        alone = calibration.of_fold(fold)
        assert torch.equal(alone.input_absmax("conv_out"), calibration.absmax_by_fold["conv_out"][fold, 0])
    for name, by_fold in calibration.absmax_by_fold.items():
        assert torch.equal(by_fold.amax(0), calibration.absmax[name])
    assert not torch.equal(*calibration.absmax_by_fold["conv_out"])


def test_one_prompt_is_one_fold(shared_pipe):
    single = calibrate(shared_pipe, PROMPTS[:1], SamplingSettings(2, 4.0))
    assert single.absmax_by_fold == {}
    assert single.of_fold(1) is single
    assert list(single.trajectory.by_fold()) == [0]


def test_guidance_halves_are_both_recorded(calibration):
    assert [call.output.shape[0] for call in calibration.trajectory.calls] == [2 * len(PROMPTS)] * 3


def test_hooks_are_gone_afterwards(shared_pipe, calibration):
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in shared_pipe.unet.modules())


def test_operations_count_multiply_accumulates(shared_pipe, calibration):
    conv_in = shared_pipe.unet.conv_in
    positions = 2 * len(PROMPTS) * 8 * 8
    assert calibration.operations["conv_in"] == positions * conv_in.weight.numel()


def test_a_layer_that_sees_nan_is_named(pipe):
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0\..*NaN"):
        calibrate(pipe, PROMPTS, SETTINGS)
    assert not any(m._forward_hooks for m in pipe.unet.modules())


def test_a_quantized_model_is_refused(pipe):
    convert(pipe.unet, uniform_plan(pipe.unet, "w8a16"))
    with pytest.raises(ValueError, match="quantized already"):
        calibrate(pipe, PROMPTS, SETTINGS)


def test_no_prompts_and_an_unknown_mode_are_refused(shared_pipe):
    with pytest.raises(ValueError, match="at least one prompt"):
        calibrate(shared_pipe, [], SETTINGS)
    with pytest.raises(ValueError, match="first-step"):
        calibrate(shared_pipe, PROMPTS, SETTINGS, mode="last-step")


def test_channels_are_found_in_linears_and_convolutions():
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[1, 2, 3, 3] = -7
    assert channel_absmax(nn.Conv2d(3, 1, 1), pictures).tolist() == [[0, 0, 0], [0, 0, 7]]
    tokens = torch.zeros(2, 5, 3)
    tokens[1, 4, 1] = -2
    assert channel_absmax(nn.Linear(3, 1), tokens).tolist() == [[0, 0, 0], [0, 2, 0]]
    assert channel_absmax(nn.Linear(3, 1), tokens[:, 4]).tolist() == [[0, 0, 0], [0, 2, 0]]
    assert channel_absmax(nn.Conv2d(3, 1, 1), pictures[1]).tolist() == [[0, 0, 7]]
    assert channel_absmax(nn.Linear(3, 1), tokens[1, 4]).tolist() == [[0, 2, 0]]
    tokens[0, 0, 2] = torch.nan
    assert channel_absmax(nn.Linear(3, 1), tokens).isnan().tolist() == [[False, False, True], [False] * 3]


def test_scale_and_drift_are_ratios_of_largest_values():
    by_step = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    assert range_drift(by_step) == pytest.approx(1.5)
    absmax, scheme = torch.tensor([1.0, 254.0]), SCHEMES["w8a8-static"]
    assert static_scale(absmax, None, scheme) == pytest.approx(2.0)
    assert static_scale(absmax, torch.tensor([1.0, 0.5]), scheme) == pytest.approx(1.0)
    assert static_scale(torch.zeros(2), None, scheme) is None


def test_a_first_step_calibration_can_stop_there(shared_pipe, calibration):
    short = calibrate(shared_pipe, PROMPTS, SETTINGS, whole=False)
    assert [call.step for call in short.trajectory.calls] == [0]
    assert not any(m._forward_hooks for m in shared_pipe.unet.modules())
    for name in calibration.absmax:
        assert torch.equal(short.input_absmax(name), calibration.input_absmax(name))


def test_sampled_steps_lie_between_the_first_and_all(shared_pipe):
    settings = SamplingSettings(num_inference_steps=7, guidance_scale=4.0)
    sampled = calibrate(shared_pipe, PROMPTS, settings, mode="sampled-steps")
    for name, by_step in sampled.absmax.items():
        assert torch.equal(sampled.input_absmax(name), by_step[[0, 2, 4, 6]].amax(0))


def test_drawn_steps_are_the_same_each_time_and_lie_around_the_middle():
    drawn = drawn_steps(50, 4)
    assert drawn == drawn_steps(50, 4) == sorted(set(drawn))
    assert len(drawn) == 4
    many = drawn_steps(1000, 200)
    assert 450 < np.mean(many) < 550
    assert 180 < np.std(many) < 270  # a normal one's deviation, of what is drawn once only; uniform: 289
    assert drawn_steps(3, 4) == [0, 1, 2]


def test_calibration_on_drawn_steps_takes_their_ranges(shared_pipe):
    settings = SamplingSettings(num_inference_steps=7, guidance_scale=4.0)
    drawn = calibrate(shared_pipe, PROMPTS[:1], settings, mode="drawn-steps")
    chosen = drawn_steps(7, 4)
    assert chosen not in (list(range(7)), [0, 2, 4, 6])
    for name, by_step in drawn.absmax.items():
        assert torch.equal(drawn.input_absmax(name), by_step[chosen].amax(0))


def test_layers_of_a_transformer_that_read_the_time_alone_take_all_steps_in_every_mode():
    pipe, calls = all_rows()["flux"].build()
    pipe.set_progress_bar_config(disable=True)
    calibration = calibrate(pipe, calls[:1], SamplingSettings(None, None), whole=False)
    modulation = {name for name in calibration.absmax if name.endswith(("norm.linear", "norm1.linear"))}
    assert modulation
    assert modulation | {"norm_out.linear", "time_text_embed.timestep_embedder.linear_1"} <= calibration.of_conditions
    assert not {name for name in calibration.of_conditions if "attn" in name or "ff" in name}
    for name, by_step in calibration.absmax.items():
        assert len(by_step) > 1
        wanted = by_step.amax(0) if name in calibration.of_conditions else by_step[0]
        assert torch.equal(calibration.input_absmax(name), wanted)


def test_the_first_token_is_left_out_of_the_ranges_of_layers_that_read_the_text(pipe):
    encode = pipe.encode_prompt

    def with_a_large_first_token(*args, **kwargs):
        texts = encode(*args, **kwargs)
        for text in texts:
            text[:, 0] = 500.0
        return texts

    pipe.encode_prompt = with_a_large_first_token
    seen = calibrate(pipe, PROMPTS, SETTINGS)
    expected = {n for n in quantizable_layers(pipe.unet) if n.endswith(("attn2.to_k", "attn2.to_v"))}
    assert seen.text_layers == expected
    assert expected
    assert all(float(seen.input_absmax(name).amax()) < 100 for name in expected)
    whole = seen.with_first_token()
    assert all(float(whole.input_absmax(name).amax()) == 500 for name in expected)
    assert all(float(whole.of_fold(fold).input_absmax(name).amax()) == 500 for name in expected for fold in (0, 1))
    assert torch.equal(whole.input_absmax("conv_in"), seen.input_absmax("conv_in"))


def test_inputs_that_are_concatenations_are_found_with_the_place_of_the_cut(shared_pipe, calibration):
    channels = {n: m.weight.shape[1] for n, m in quantizable_layers(shared_pipe.unet).items()}
    found = calibration.concatenations
    expected = {n for n in channels if n.startswith("up_blocks") and n.endswith(("conv1", "conv_shortcut"))}
    assert set(found) == expected
    assert expected
    for name, first in found.items():
        block = shared_pipe.unet.get_submodule(name.rsplit(".", 1)[0])
        assert 0 < first < channels[name] == block.norm1.num_channels
    assert found["up_blocks.0.resnets.0.conv1"] == 64  # the middle's channels; the skip's follow


def test_layers_below_a_lora_are_calibrated_under_their_own_names_with_what_it_makes_of_their_inputs(pipe):
    from peft import LoraConfig

    plain = calibrate(pipe, PROMPTS, SETTINGS)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    adapted = calibrate(pipe, PROMPTS, SETTINGS)
    assert list(adapted.absmax) == list(plain.absmax)
    assert adapted.concatenations == plain.concatenations
    assert torch.equal(adapted.absmax["conv_in"][0], plain.absmax["conv_in"][0])  # the same noise
    assert not torch.equal(adapted.absmax["conv_out"], plain.absmax["conv_out"])


def test_the_prompt_that_gives_nan_is_named(pipe):
    forward = pipe.unet.forward

    def broken(sample, *args, **kwargs):
        out = forward(sample, *args, **kwargs)
        out[0][:] = float("nan")
        return out

    pipe.unet.forward = broken
    with pytest.raises(ValueError, match=r"not finite at sampling step 0, prompts 'a red circle'"):
        calibrate(pipe, ["a red circle"], SETTINGS)


@pytest.mark.parametrize(
    ("timesteps", "groups", "expected"),
    [([900, 700, 500, 300], 2, (600.0,)), ([900, 700, 500, 300], 4, (800.0, 600.0, 400.0)), ([5], 4, ())],
)
def test_timestep_groups_hold_equally_many_steps(timesteps, groups, expected):
    assert group_boundaries(timesteps, groups) == expected


def test_a_boundary_belongs_to_the_group_before_it():
    assert [group_of(t, (600.0, 300.0)) for t in (999, 600, 599.9, 300, 299, 0)] == [0, 0, 1, 1, 2, 2]


def test_grouped_ranges_are_the_largest_of_each_group():
    by_step = torch.tensor([[1.0], [4.0], [2.0], [3.0]])
    assert grouped_absmax(by_step, [900, 700, 500, 300], (600.0,)).tolist() == [[4.0], [3.0]]


def test_a_call_cut_to_some_prompts_keeps_both_halves(calibration):
    call = calibration.trajectory.calls[1]
    cut = call.of_prompts([1])
    assert cut.prompts == (1,)
    assert cut.guided
    assert torch.equal(cut.args[0], call.args[0][[1, 3]])
    assert torch.equal(cut.output, call.output[[1, 3]])
    with pytest.raises(ValueError, match="draws none"):
        call.of_prompts([7])
