"""The planner's bytes are the bytes of the tensors that a checkpoint holds."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.numerics.formats import FLOAT, SCHEMES
from ldmq_kernels.plans.cost import layer_bytes, operation_cost, weight_bytes
from ldmq_kernels.plans.plan import LayerPlan


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.quantizes], ids=str)
@pytest.mark.parametrize(
    "layer", [nn.Linear(130, 20, bias=False), nn.Conv2d(70, 12, 3, bias=False)], ids=["linear", "conv2d"]
)
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_bytes_match_the_state_dict(layer, scheme, smoothed, bias):
    kind = "linear" if isinstance(layer, nn.Linear) else "conv2d"
    scales = (0.3, 0.2, 0.1) if scheme.has_timestep_scales else 0.1
    choice = LayerPlan(scheme, "", scales)
    if kind not in scheme.format.layers:
        with pytest.raises(ValueError, match=str(scheme)):
            quantize_layer("layer", layer, choice)
        return
    if smoothed:
        choice = replace(choice, smoothing=torch.ones(layer.weight.shape[1]))
    if bias:
        choice = replace(choice, bias_correction=torch.ones(layer.weight.shape[0]))
    half = layer.half()
    quantized = quantize_layer("layer", half, choice)
    stored = sum(t.numel() * t.element_size() for t in quantized.state_dict().values())
    assert stored == layer_bytes(half, choice)


def test_a_bias_that_is_there_costs_nothing_more_and_float_is_two_bytes_a_weight():
    layer = nn.Linear(130, 20)
    choice = LayerPlan(SCHEMES["w8a16"], bias_correction=torch.ones(20))
    assert layer_bytes(layer, choice) == weight_bytes(layer, SCHEMES["w8a16"]) == 130 * 20 + 4 * 20
    assert weight_bytes(layer, FLOAT) == 2 * 130 * 20


def test_no_scheme_is_dearer_than_float_but_weight_only_ones():
    costs = {name: operation_cost(1000, scheme) for name, scheme in SCHEMES.items()}
    assert costs["w8a8-static"] == costs["w8a8-timestep"] < costs["w8a8-dynamic"] < costs["fp16"] < costs["w8a16"]
