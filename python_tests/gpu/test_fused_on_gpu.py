"""A quantized UNet on a device: its fused blocks beside diffusers' own, the backend that serves it, no waiting."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from ldmq_kernels.integrations.diffusers.fused import PLAIN, unfuse
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.gpu.unets import SCHEMES, inputs, on_device, output

pytestmark = pytest.mark.gpu
NEAR = {torch.float32: 45.0, torch.float16: 35.0}  # dB; rounding to 16 bits turns over more ties of int8


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fused_unet_computes_what_the_unfused_one_does(scheme: str, dtype: torch.dtype, device: torch.device) -> None:
    unet = on_device(scheme, device, dtype)
    plain = unfuse(copy.deepcopy(unet))
    assert {type(module) for module in unet.modules()} >= set(PLAIN)
    for size in (8, 16):
        given = inputs(device, dtype, size=size)
        assert float(sqnr_db(output(plain, given), output(unet, given))) > NEAR[dtype]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_triton_serves_every_op_as_the_reference(scheme: str, device: torch.device) -> None:
    unet, given = on_device(scheme, device, torch.float32), inputs(device, torch.float32)
    dispatch.reset_dispatch_report()
    out = output(unet, given)
    report = dispatch.dispatch_report()
    assert {line.split()[1] for line in report.splitlines()} == {"triton"}, report
    assert "refused" not in report
    with dispatch.use_backend("reference"), torch.backends.cudnn.flags(enabled=False):
        wanted = output(unet, given)
    assert float(sqnr_db(wanted, out)) > NEAR[torch.float32]


def test_memory_format_does_not_change_the_result(device: torch.device) -> None:
    unet, given = on_device("w8a8-dynamic", device, torch.float16), inputs(device, torch.float16)
    wanted = output(unet, given)
    given["sample"] = given["sample"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(output(unet.to(memory_format=torch.channels_last), given), wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_unet_never_waits_for_the_gpu(scheme: str, device: torch.device) -> None:
    unet, given = on_device(scheme, device, torch.float16), inputs(device, torch.float16)
    wanted = output(unet, given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = output(unet, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("name", ["down_blocks.0.resnets.0", "mid_block.attentions.0"])
def test_a_fused_block_is_one_graph_for_the_compiler(name: str, device: torch.device) -> None:
    block: nn.Module = on_device("w8a8-dynamic", device, torch.float16).get_submodule(name)
    half = {"dtype": torch.float16, "device": device}
    if "resnets" in name:
        arguments: tuple[Tensor, ...] = torch.randn(2, 32, 8, 8, **half), torch.randn(2, 128, **half)
    else:
        arguments = torch.randn(2, 64, 8, 8, **half), torch.randn(2, 7, 32, **half)

    def run(*tensors: Tensor) -> Tensor:
        return block(*tensors) if "resnets" in name else block(*tensors, return_dict=False)[0]

    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(run, fullgraph=True)(*arguments)
        assert float(sqnr_db(run(*arguments), out)) > NEAR[torch.float16]
