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
from python_tests.gpu.unets import SCHEMES, calls_of_blocks, first, inputs, on_device, output
from python_tests.tiny import tiny_unet

pytestmark = pytest.mark.gpu
# dB over one block, by what is compared: sums in another order, or also a rounding of each operation to 16 bits
SAME_FORM, OTHER_FORM = 45.0, {torch.float32: 45.0, torch.float16: 35.0}
DTYPES = tuple(OTHER_FORM)


@pytest.mark.usefixtures("without_cudnn")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_fused_block_computes_what_the_plain_one_and_the_reference_do(
    scheme: str, dtype: torch.dtype, device: torch.device
) -> None:
    unet = on_device(scheme, device, dtype)
    plain = unfuse(copy.deepcopy(unet))
    calls = calls_of_blocks(unet, inputs(device, dtype, size=16))
    assert {type(block) for _, block, *_ in calls} == set(PLAIN)
    for name, block, args, kwargs in calls:
        with dispatch.use_backend("triton"), torch.no_grad():
            out, unfused = (first(module(*args, **kwargs)) for module in (block, plain.get_submodule(name)))
        with dispatch.use_backend("reference"), torch.no_grad():
            wanted = first(block(*args, **kwargs))
        assert float(sqnr_db(wanted, out)) > SAME_FORM, name
        assert float(sqnr_db(unfused, out)) > OTHER_FORM[dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fused_unet_is_as_near_to_the_float_model_as_the_unfused_one(
    scheme: str, dtype: torch.dtype, device: torch.device
) -> None:
    """A tie that falls the other way early turns over many later ones: whole outputs differ by quantization noise."""
    unet = on_device(scheme, device, dtype)
    plain = unfuse(copy.deepcopy(unet))
    for size in (8, 16):
        wanted = output(tiny_unet().to(device), inputs(device, torch.float32, size=size))
        given = inputs(device, dtype, size=size)
        fused, unfused = (float(sqnr_db(wanted, output(model, given).float())) for model in (unet, plain))
        assert unfused > 8
        assert abs(fused - unfused) < 1.0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_triton_serves_every_op(scheme: str, device: torch.device) -> None:
    unet, given = on_device(scheme, device, torch.float16), inputs(device, torch.float16)
    dispatch.reset_dispatch_report()
    output(unet, given)
    report = dispatch.dispatch_report()
    assert {line.split()[1] for line in report.splitlines()} == {"triton"}, report
    assert "refused" not in report


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
        assert float(sqnr_db(run(*arguments), out)) > OTHER_FORM[torch.float16]
