"""Each block's own noise, and what it makes of its input's."""

import pytest
import torch

from ldmq_kernels.calibration import SamplingSettings, calibrate
from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan
from ldmq_kernels.sensitivity.output_noise import output_noise, swapped
from ldmq_kernels.sensitivity.propagation import blocks_of, propagation
from python_tests.tiny import PROMPTS

SETTINGS = SamplingSettings(num_inference_steps=2, guidance_scale=4.0)


@pytest.fixture(scope="module")
def trajectory(shared_pipe):
    return calibrate(shared_pipe, PROMPTS, SETTINGS).trajectory


def copies_of(model, wanted=lambda name: True):
    choice = LayerPlan(SCHEMES["w4a8-dynamic"])
    return {name: quantize_layer(name, m, choice) for name, m in quantizable_layers(model).items() if wanted(name)}


def test_every_block_is_measured_at_every_step_and_the_model_is_left_in_float(shared_pipe, trajectory):
    before = dict(quantizable_layers(shared_pipe.unet))
    found = propagation(shared_pipe.unet, copies_of(shared_pipe.unet), trajectory)
    blocks = blocks_of(shared_pipe.unet)
    assert [(entry.block, entry.step) for entry in found] == [(b, s) for s in (0, 1) for b in blocks]
    assert dict(quantizable_layers(shared_pipe.unet)) == before
    assert not any(m._forward_hooks for m in shared_pipe.unet.modules())
    assert all(entry.own_noise > 0 for entry in found)


def test_the_first_block_receives_nothing_and_the_last_ones_total_is_the_models(shared_pipe, trajectory):
    copies = copies_of(shared_pipe.unet)
    found = propagation(shared_pipe.unet, copies, trajectory)
    first = [entry for entry in found if entry.block == "conv_in"]
    assert all(entry.input_noise == 0 and entry.propagated_noise == 0 and entry.amplification == 0 for entry in first)
    assert all(entry.total_noise == entry.own_noise for entry in first)
    with swapped(shared_pipe.unet, copies), torch.no_grad():
        whole = output_noise(shared_pipe.unet, trajectory)
    last = {entry.step: entry.total_noise for entry in found if entry.block == "conv_out"}
    assert last == pytest.approx(whole.by_step, rel=1e-5)


def test_a_float_block_behind_a_quantized_one_passes_on_all_that_it_has(shared_pipe, trajectory):
    copies = copies_of(shared_pipe.unet, lambda name: name == "conv_in")
    found = propagation(shared_pipe.unet, copies, trajectory)
    behind = [entry for entry in found if entry.block == "down_blocks.0.resnets.0"]
    assert all(
        entry.input_noise > 0 and entry.own_noise == 0 and entry.propagated_noise == entry.total_noise
        for entry in behind
    )
    untouched = [entry for entry in found if entry.block == "time_embedding"]
    assert all(entry.input_noise == entry.total_noise == 0 for entry in untouched)
