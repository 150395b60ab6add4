"""A quantized UNet is one graph for torch.compile."""

from __future__ import annotations

import pytest
import torch

import ldmq_kernels as ldmq
from python_tests.tiny import mixed_plan, tiny_unet, unet_inputs


@pytest.mark.slow
def test_a_unet_with_every_scheme_compiles_without_graph_break_to_the_same_result():
    unet = tiny_unet()
    ldmq.quantize(unet, mixed_plan(unet))
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    with torch.no_grad():
        inputs = unet_inputs()
        assert torch.equal(compiled(**inputs).sample, unet(**inputs).sample)
