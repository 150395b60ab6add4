"""A quantized UNet in fused blocks is one graph for torch.compile on a device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.gpu.unets import inputs, on_device, output
from python_tests.tiny import tiny_unet

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "mixed"])
def test_a_fused_unet_compiles_without_graph_break(scheme: str, device: torch.device) -> None:
    unet, given = on_device(scheme, device, torch.float16), inputs(device, torch.float16)
    wanted = output(tiny_unet().to(device), inputs(device, torch.float32))
    eager = float(sqnr_db(wanted, output(unet, given).float()))
    torch._dynamo.reset()
    out = output(torch.compile(unet, fullgraph=True), given)
    # a compiler keeps float32 between operations, which turns over ties
    assert abs(float(sqnr_db(wanted, out.float())) - eager) < 1.0
