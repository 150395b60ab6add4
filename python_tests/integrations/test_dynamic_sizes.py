"""One compiled or exported program for several sizes. docs/using/compile.md has whole models, and is run."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch._dynamo.testing import CompileCounterWithBackend

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.diffusers.fused import fuse
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.tiny import SHALLOW, mixed_plan, tiny_unet, unet_inputs


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, None])
def test_a_fused_block_compiles_by_inductor_twice_at_most_for_all_sizes(dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=8, groups=4).eval()
    fuse(ldmq.quantize(block, scheme="w8a8-dynamic"))
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=dynamic)
    for height, width in ((6, 10), (10, 12), (12, 14)):  # none as many as the channels, which are fixed
        x, temb = torch.randn(2, 8, height, width), torch.randn(2, 8)
        assert sqnr_db(block(x, temb), compiled(x, temb)) > 60
    assert counter.frame_count <= 2


@pytest.mark.slow
@torch.no_grad()
def test_a_unet_of_every_scheme_is_exported_for_any_batch_and_size(tmp_path):
    unet = tiny_unet(**SHALLOW)
    ldmq.quantize(unet, mixed_plan(unet))
    auto = torch.export.Dim.AUTO
    sizes = {"sample": {0: auto, 2: auto, 3: auto}, "timestep": None, "encoder_hidden_states": {0: auto}}
    program = torch.export.export(unet, (), kwargs=unet_inputs(), strict=False, dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "unet.pt2")
    loaded = torch.export.load(tmp_path / "unet.pt2").module()
    for timestep, batch, height, width in ((321, 2, 8, 8), (700, 3, 12, 10), (5, 4, 6, 16)):
        inputs = {
            "sample": torch.randn(batch, 4, height, width),
            "timestep": torch.tensor(timestep),
            "encoder_hidden_states": torch.randn(batch, 40, 32),
        }
        torch.testing.assert_close(loaded(**inputs).sample, unet(**inputs).sample)
