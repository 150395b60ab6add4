"""What diffusers' models tell and offer works on quantized ones, or is refused with a reason."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.diffusers import CheckpointError, LdmqConfig
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.backend import Packer
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import PlanError
from python_tests.tiny import SHALLOW, mixed_plan, run_unet, tiny_unet


def in_float(model):
    layers = quantizable_layers(model).items()
    return {name for name, m in layers if not (isinstance(m, QuantizedLayer) and m.scheme.quantizes)}


def test_what_is_named_stays_in_float_in_place_and_while_loading(tmp_path):
    left = ["conv_in", "conv2", "attentions.0.proj_in", "*.attn2.to_*"]
    unet = tiny_unet(**SHALLOW)
    unet.save_pretrained(tmp_path / "float")
    names = quantizable_layers(unet)
    ldmq.quantize(unet, scheme="w8a8-dynamic", modules_to_not_convert=left)
    wanted = {n for n in names if n == "conv_in" or n.endswith(("conv2", "attentions.0.proj_in")) or ".attn2.to_" in n}
    assert 8 < len(wanted) < 20
    assert in_float(unet) == wanted
    config = LdmqConfig("w8a8-dynamic", modules_to_not_convert=left)
    assert LdmqConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "float", quantization_config=config)
    assert in_float(loaded) == wanted
    loaded.save_pretrained(tmp_path / "again")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "again")
    assert torch.equal(run_unet(again), run_unet(unet))


def test_a_name_that_nothing_has_is_refused_and_so_are_names_beside_a_plan():
    unet = tiny_unet(**SHALLOW)
    with pytest.raises(PlanError, match="no layer of this UNet2DConditionModel is called 'pro'"):
        ldmq.quantize(unet, scheme="w8a8-dynamic", modules_to_not_convert=["pro"])
    plan = mixed_plan(unet)
    with pytest.raises(PlanError, match="goes with a scheme"):
        ldmq.quantize(unet, plan, modules_to_not_convert=["conv_in"])
    with pytest.raises(PlanError, match="goes with a scheme"):
        LdmqConfig(plan=plan, modules_to_not_convert=["conv_in"])
    assert len(in_float(unet)) == 33


def test_parameters_are_counted_as_in_float():
    unet = tiny_unet(**SHALLOW)
    counted, without = unet.num_parameters(), unet.num_parameters(exclude_embeddings=True)
    ldmq.quantize(unet, mixed_plan(unet))
    assert (unet.num_parameters(), unet.num_parameters(exclude_embeddings=True)) == (counted, without)
    assert unet.num_parameters(only_trainable=True) == 0


def test_layerwise_casting_is_refused_with_the_reason():
    unet = tiny_unet(**SHALLOW)
    ldmq.quantize(unet, scheme="w8a8-dynamic")
    before = run_unet(unet)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel is quantized \(33 layers, such as conv_in\).*in fewer"):
        unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert torch.equal(run_unet(unet), before)
    tiny_unet(**SHALLOW).enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def test_a_model_is_dequantized_saved_and_quantized_again(tmp_path):
    unet = tiny_unet(**SHALLOW)
    exact, entries = run_unet(unet), dict(unet.config)
    plan = mixed_plan(unet)
    ldmq.quantize(unet, plan)
    weights = {name: layer.weight.clone() for name, layer in quantizable_layers(unet).items()}
    twin = copy.deepcopy(unet)
    assert unet.dequantize() is unet
    assert len(in_float(unet)) == 33
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in quantizable_layers(unet).items())
    assert dict(unet.config) == entries
    assert sqnr_db(exact, run_unet(unet)) > sqnr_db(exact, run_unet(twin))
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert sqnr_db(run_unet(unet), run_unet(loaded)) > 100
    assert not any(isinstance(m, QuantizedLayer) for m in loaded.modules())
    ldmq.quantize(unet, plan)
    assert sqnr_db(run_unet(twin), run_unet(unet)) > 20


def test_a_single_file_of_a_quantized_model_is_refused_with_the_way_to_load_it(tmp_path):
    unet = tiny_unet(**SHALLOW)
    ldmq.quantize(unet, scheme="w8a8-dynamic")
    unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointError, match=r"model\.safetensors is of a quantized model.* with from_pretrained"):
        UNet2DConditionModel.from_single_file(str(file), config=str(tmp_path))


def test_group_offload_to_disk_takes_weights_that_a_backend_has_packed(tmp_path, monkeypatch):
    unet = tiny_unet(**SHALLOW)
    ldmq.quantize(unet, mixed_plan(unet))
    before = run_unet(unet)
    packed = Packer(
        "a test",
        lambda weight: weight.is_mkldnn,
        lambda weight, _multiplier, _channels: weight.float().to_mkldnn(),
        lambda held, _multiplier, _outputs: held.to_dense().to(torch.int8),
    )
    layer = unet.conv_out
    layer.unpack()
    monkeypatch.setattr(dispatch, "packer", lambda *_: packed)
    layer.pack()
    assert layer.packed_weight.is_mkldnn
    cpu = torch.device("cpu")
    unet.enable_group_offload(cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    for _ in range(2):
        assert torch.equal(run_unet(unet), before)
