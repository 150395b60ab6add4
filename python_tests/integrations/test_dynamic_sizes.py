"""One compiled program for several sizes, and one made ahead; docs/using/compile.md, which is run, has whole models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch._dynamo.testing import CompileCounterWithBackend

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.diffusers.fused import fuse
from ldmq_kernels.numerics.sqnr import sqnr_db


def quantized_block() -> ResnetBlock2D:
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=8, groups=4).eval()
    return fuse(ldmq.quantize(block, scheme="w8a8-dynamic"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@torch.no_grad()
def test_a_fused_block_is_compiled_ahead_of_time_and_loaded(tmp_path: Path):
    block, given = quantized_block(), (torch.randn(2, 8, 6, 10), torch.randn(2, 8))
    with ldmq.unpacked(block):
        program = torch.export.export(block, given, strict=False)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
    wanted = block(*given)
    assert sqnr_db(wanted, torch._inductor.aoti_load_package(package)(*given)) > 60


@pytest.mark.slow
@torch.no_grad()
def test_a_fused_block_compiles_by_inductor_twice_at_most_for_all_sizes():
    torch._dynamo.reset()
    block = quantized_block()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for height, width in ((6, 10), (10, 12), (12, 14)):  # none as many as the channels, which are fixed
        x, temb = torch.randn(2, 8, height, width), torch.randn(2, 8)
        assert sqnr_db(block(x, temb), compiled(x, temb)) > 60
    assert counter.frame_count <= 2
