"""Times of a device that is not there: for every layer and scheme, and called predicted wherever they are shown."""

from __future__ import annotations

import pytest
from torch import nn

from ldmq_kernels.calibration.trajectory import UNetCall
from ldmq_kernels.integrations.diffusers import card
from ldmq_kernels.kernels.devices import DEVICES
from ldmq_kernels.planning.predicted_times import predict_times
from ldmq_kernels.planning.request import PlanRequest
from ldmq_kernels.planning.times import LayerTimes
from ldmq_kernels.plans.cost import time_in_words
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.sensitivity.analysis import Analysis
from python_tests.report.analyses import TRIED, made_up_analysis
from python_tests.tiny import run_unet, tiny_unet, unet_inputs


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return tiny_unet()


@pytest.fixture(scope="module")
def analysis(unet: nn.Module) -> Analysis:
    return made_up_analysis(unet)


@pytest.fixture(scope="module")
def times(unet: nn.Module, analysis: Analysis) -> LayerTimes:
    return predict_times(unet, analysis, UNetCall(0, (), unet_inputs(), run_unet(unet)), DEVICES["h200"])


def test_every_layer_has_a_time_in_every_scheme(unet: nn.Module, times: LayerTimes) -> None:
    assert set(times.layers) == {(name, scheme) for name in quantizable_layers(unet) for scheme in ("fp16", *TRIED)}
    assert min(times.layers.values()) > 0 < times.rest
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    static, dynamic = (times.layers[f"{block}.attn1.to_q", f"w8a8-{kind}"] for kind in ("static", "dynamic"))
    assert static == times.layers[f"{block}.attn1.to_k", "w8a8-static"] < dynamic  # in one launch, and in two


def test_what_is_beside_the_layers_is_none_of_the_layers(
    unet: nn.Module, analysis: Analysis, times: LayerTimes
) -> None:
    slower = predict_times(unet, analysis, UNetCall(0, (), unet_inputs(), run_unet(unet)), DEVICES["rtx3090"])
    assert slower.rest >= times.rest
    assert not any(layer._forward_pre_hooks for layer in quantizable_layers(unet).values())


def test_a_plan_calls_them_predicted(times: LayerTimes) -> None:
    recorded = times.recorded(1.5)
    assert recorded["predicted_for"] == "NVIDIA H200"
    assert recorded["predicted_milliseconds"] == round(times.rest + 1.5, 4)
    assert not {"milliseconds", "milliseconds_float"} & set(recorded)
    assert "predicted for NVIDIA H200 and not measured" in time_in_words(recorded)
    assert "predicted for NVIDIA H200 and not measured" in card._measured("unet", recorded)
    measured = LayerTimes(times.layers, times.rest).recorded(1.5)
    assert set(measured) == {"milliseconds", "milliseconds_float"}
    assert "predicted" not in time_in_words(measured)
    assert time_in_words({}) == card._measured("unet", {}) == ""


def test_a_request_for_them_needs_times_and_a_device_of_the_table() -> None:
    assert PlanRequest(["a"], times_for="h200").needs_times
    with pytest.raises(ValueError, match="nothing is known of the device 'abacus'"):
        PlanRequest(["a"], times_for="abacus")


def test_formats_that_the_device_has_not_are_refused_before_anything_is_measured() -> None:
    assert PlanRequest(["a"], formats=["w8a8", "fp8"], times_for="rtx4090").needs_times
    with pytest.raises(ValueError, match="NVIDIA A100 80GB has no FP8, so nothing predicts fp8-static, fp8-dynamic"):
        PlanRequest(["a"], formats=["w8a8", "fp8"], times_for="a100")
