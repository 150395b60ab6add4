"""A model in FP8 is saved and loaded to the same bits, quantized while it is loaded, and planned beside int8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.diffusers import LdmqConfig
from ldmq_kernels.integrations.diffusers.quantizer import CheckpointError
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.plan import LayerPlan, Plan, uniform_plan
from python_tests.tiny import SHALLOW, run_unet, tiny_unet

FILE = "diffusion_pytorch_model.safetensors"


def mixed() -> Plan:
    """FP8 but for conv_in, with a calibrated scale in one layer and int8 in another."""
    unet = tiny_unet(**SHALLOW)
    plan = uniform_plan(unet, "fp8-dynamic")
    plan.set("conv_in", LayerPlan(SCHEMES["fp8-static"], "by hand", 0.01))
    plan.set("conv_out", LayerPlan(SCHEMES["w8a8-dynamic"], "by hand"))
    return plan


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[UNet2DConditionModel, Path]:
    folder = tmp_path_factory.mktemp("fp8")
    unet = ldmq.quantize(tiny_unet(**SHALLOW), mixed())
    unet.save_pretrained(folder)
    return unet, folder


def test_it_loads_to_the_same_bits_in_any_float_dtype(saved: tuple[UNet2DConditionModel, Path]) -> None:
    unet, folder = saved
    assert load_file(folder / FILE)["conv_in.weight"].dtype == torch.float8_e4m3fn
    stored = unet.state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        loaded = UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype)
        for name, tensor in loaded.state_dict().items():
            if name.endswith("weight") and tensor.dtype == torch.float8_e4m3fn:
                assert torch.equal(tensor.view(torch.uint8), stored[name].view(torch.uint8)), name
    assert torch.equal(run_unet(UNet2DConditionModel.from_pretrained(folder)), run_unet(unet))
    half = unet.to(torch.bfloat16).to(torch.float32)
    assert half.conv_in.plain_weight.dtype == torch.float8_e4m3fn


def test_it_is_quantized_while_it_is_loaded_as_it_is_afterwards(tmp_path: Path) -> None:
    unet = tiny_unet(**SHALLOW)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=LdmqConfig("fp8-dynamic"))
    assert torch.equal(run_unet(loaded), run_unet(ldmq.quantize(tiny_unet(**SHALLOW), scheme="fp8-dynamic")))
    assert sqnr_db(run_unet(unet), run_unet(loaded)) > 20
    exact = run_unet(loaded)
    with ldmq.use_backend("reference"):
        torch.testing.assert_close(run_unet(loaded), exact, rtol=1e-2, atol=1e-2 * float(exact.abs().max()))


def test_nan_in_a_stored_weight_is_refused(saved: tuple[UNet2DConditionModel, Path], tmp_path: Path) -> None:
    _, folder = saved
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / FILE)
    tensors["conv_in.weight"].view(torch.uint8)[0, 0, 0, 0] = 0x7F
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match="conv_in: weight holds a value that is not finite"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_a_plan_with_it_survives_its_file(tmp_path: Path) -> None:
    plan = mixed()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").to_dict() == plan.to_dict()
