"""One compiled program for several sizes. docs/using/compile.md has whole models, compiled and exported, and is run."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch._dynamo.testing import CompileCounterWithBackend

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.diffusers.fused import fuse
from ldmq_kernels.numerics.sqnr import sqnr_db


@pytest.mark.slow
@torch.no_grad()
def test_a_fused_block_compiles_by_inductor_twice_at_most_for_all_sizes():
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=8, groups=4).eval()
    fuse(ldmq.quantize(block, scheme="w8a8-dynamic"))
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for height, width in ((6, 10), (10, 12), (12, 14)):  # none as many as the channels, which are fixed
        x, temb = torch.randn(2, 8, height, width), torch.randn(2, 8)
        assert sqnr_db(block(x, temb), compiled(x, temb)) > 60
    assert counter.frame_count <= 2
