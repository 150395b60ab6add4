"""A quantized UNet is one graph for torch.compile."""

from __future__ import annotations

import pytest
import torch

import ldmq_kernels as ldmq
from ldmq_kernels.numerics.formats import SCHEMES
from python_tests.tiny import SHALLOW, mixed_plan, tiny_unet, unet_inputs


@pytest.mark.slow
def test_a_unet_with_every_scheme_compiles_without_graph_break_to_the_same_result():
    unet = tiny_unet(**SHALLOW)
    plan = mixed_plan(unet)
    assert {layer_plan.scheme for layer_plan in plan.layers(unet).values()} == set(SCHEMES.values())
    ldmq.quantize(unet, plan)
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    with torch.no_grad():
        inputs = unet_inputs()
        assert torch.equal(compiled(**inputs).sample, unet(**inputs).sample)
