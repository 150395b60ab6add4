"""A quantized UNet is one graph for torch.compile."""

from __future__ import annotations

import subprocess
import sys

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


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "fp8-static"])
def test_a_new_process_compiles_before_any_eager_call(scheme: str) -> None:
    """What an eager call would have kept by then, the compiler meets."""
    code = (
        "import torch, ldmq_kernels as ldmq\n"
        "from ldmq_kernels.nn import QuantLinear\n"
        "from ldmq_kernels.numerics.formats import SCHEMES\n"
        f"scale = torch.ones(1) if SCHEMES[{scheme!r}].is_static else None\n"
        f"layer = QuantLinear.from_float(torch.nn.Linear(8, 8), SCHEMES[{scheme!r}], input_scale=scale)\n"
        "x = torch.randn(2, 8)\n"
        "with torch.no_grad():\n"
        "    out = torch.compile(layer, fullgraph=True, backend='eager')(x)\n"
        "    assert torch.equal(out, layer(x))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
