"""Files for ComfyUI: the original names, its int8 linears, and what its layers compute from them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.comfyui import check_known, export, ldm_names
from ldmq_kernels.integrations.comfyui.export import INT8, INT8_WEIGHTS, OWN_LAYERS, PREFIX
from ldmq_kernels.nn import QuantConv2d, QuantizedLayer, QuantLinear
from python_tests.cli.commands import complaint, run
from python_tests.tiny import mixed_plan, same_bits, tiny_unet

ADDED = {  # as Stable Diffusion XL: two text encoders, the size and the crop
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
}
MIXED = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


@pytest.fixture(scope="module")
def unet() -> Any:
    unet = tiny_unet()
    return ldmq.quantize(unet, mixed_plan(unet))


@pytest.fixture(scope="module")
def written(unet: Any) -> dict[str, Tensor]:
    return load(export(unet).content)


def original(name: str, unet: Any) -> str:
    return PREFIX + ldm_names(unet)[name]


@pytest.mark.parametrize("changes", [{}, ADDED, MIXED, {"layers_per_block": 2}], ids=["1.x", "xl", "mixed", "deeper"])
def test_names_are_those_that_diffusers_reads_back(changes: dict[str, Any]) -> None:
    unet = tiny_unet(**changes)
    names = ldm_names(unet)
    renamed = {}
    for key, tensor in unet.state_dict().items():
        name, _, leaf = key.rpartition(".")
        renamed[f"{PREFIX}{names[name]}.{leaf}"] = tensor
    assert len(renamed) == len(unet.state_dict())
    back = convert_ldm_unet_checkpoint(renamed, dict(unet.config))
    assert back.keys() == unet.state_dict().keys()
    assert all(same_bits(tensor, unet.state_dict()[key]) for key, tensor in back.items())


def test_linears_are_int8_and_the_rest_has_the_same_values(unet: Any, written: dict[str, Tensor]) -> None:
    counted = {"int8": 0, "float": 0}
    for name, layer in unet.named_modules():
        if not isinstance(layer, QuantizedLayer) or not layer.scheme.quantizes:
            continue
        weight = written[original(name, unet) + ".weight"]
        if weight.dtype == torch.int8:
            counted["int8"] += 1
            assert isinstance(layer, QuantLinear)
            scale = written[original(name, unet) + ".weight_scale"]
            assert scale.shape == (layer.out_features, 1)
            assert scale.dtype == torch.float32
            torch.testing.assert_close(weight * scale, layer.weight + 0, rtol=0, atol=0)
            said = json.loads(written[original(name, unet) + ".comfy_quant"].numpy().tobytes())
            assert said.pop("format") == "int8_tensorwise"
            assert said == ({} if layer.takes_quantized or layer.first_token else {"full_precision_matrix_mult": True})
        else:
            counted["float"] += 1
            assert torch.equal(weight, layer.weight + 0)
            assert original(name, unet) + ".weight_scale" not in written
    assert min(counted.values()) > 3


def test_smoothed_and_four_bit_linears_and_convolutions_stay_in_floating_point(unet: Any) -> None:
    exported = export(unet)
    layers = [m for m in unet.modules() if isinstance(m, QuantizedLayer) and m.scheme.quantizes]
    assert sum(exported.layers.values()) == len(layers)
    of_int8 = [m for m in layers if isinstance(m, QuantLinear) and str(m.scheme).startswith("w8")]
    plain = [m for m in of_int8 if m.smoothing is None and not m.scheme.is_rotated]
    assert exported.layers[INT8] + exported.layers[INT8_WEIGHTS] == len(plain)
    assert exported.layers["floating point: convolutions"] == sum(isinstance(m, QuantConv2d) for m in layers)
    assert exported.layers["floating point: smoothed"] > 0
    assert exported.layers["floating point: rotated"] > 0


def test_rotated_linears_are_written_unrotated() -> None:
    unet = ldmq.quantize(tiny_unet(), scheme="w8a8-rotated")
    exported = export(unet)
    tensors = load(exported.content)
    name, layer = next((n, m) for n, m in unet.named_modules() if isinstance(m, QuantLinear))
    assert torch.equal(tensors[original(name, unet) + ".weight"], layer.weight + 0)
    assert exported.layers["floating point: rotated"] == sum(isinstance(m, QuantLinear) for m in unet.modules())


def test_own_layers_are_all_there(unet: Any) -> None:
    exported = export(unet, own_layers=True)
    tensors = load(exported.content)
    names = ldm_names(unet)
    for name, layer in unet.named_modules():
        if isinstance(layer, QuantizedLayer) and layer.scheme.quantizes:
            for leaf, stored in layer.stored_tensors().items():
                assert same_bits(tensors[f"{PREFIX}{names[name]}.ldmq.{leaf}"], stored)
            assert json.loads(tensors[f"{PREFIX}{names[name]}.ldmq"].numpy().tobytes())["scheme"] == str(layer.scheme)
    assert set(exported.layers) == {OWN_LAYERS}


def test_what_comfyui_would_not_recognise_is_refused(unet: Any) -> None:
    check_known(
        {"block_out_channels": (320,), "cross_attention_dim": 768, "projection_class_embeddings_input_dim": None}
    )
    with pytest.raises(ValueError, match="knows UNets by their shapes"):
        check_known(unet.config)
    with pytest.raises(ValueError, match="nothing of this UNet is quantized"):
        export(tiny_unet())
    strange = tiny_unet(attention_type="gated", cross_attention_dim=32)
    with pytest.raises(ValueError, match="position_net"):
        ldm_names(strange)


def test_the_command_writes_a_file_and_says_what_became_of_the_layers(
    unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = copy.deepcopy(unet).to(torch.bfloat16)
    unet.save_pretrained(tmp_path / "unet")
    (tmp_path / "unet-\udcff").symlink_to(tmp_path / "unet")
    out = tmp_path / "small.safetensors"
    assert run("export", tmp_path / "unet", "--comfyui", "--out", out) == 1
    assert "knows UNets by their shapes" in complaint(capsys)
    monkeypatch.setattr("ldmq_kernels.integrations.comfyui.check_known", lambda _config: None)
    for name in ("unet", "unet-\udcff"):  # over its own file too
        assert run("export", tmp_path / name, "--comfyui", "--out", out) == 0
    told = capsys.readouterr().out
    exported = export(UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.bfloat16))
    assert out.read_bytes() == exported.content
    for what, count in exported.layers.items():
        assert f"{count} layers: {what}" in told
    with safe_open(out, "pt") as opened:
        assert not json.loads(opened.metadata()["ldmq_comfyui"])["own_layers"]


def test_the_command_refuses_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ldmq_kernels.integrations.comfyui.check_known", lambda _config: None)
    tiny_unet().save_pretrained(tmp_path / "float")
    assert run("export", tmp_path / "float", "--comfyui", "--out", tmp_path / "a") == 1
    assert "nothing of this UNet is quantized" in complaint(capsys)
    assert run("export", tmp_path / "nowhere", "--comfyui", "--out", tmp_path / "a") == 1
    assert "holds no UNet" in complaint(capsys)
    (tmp_path / "mine").write_text("mine")
    assert run("export", tmp_path / "float", "--comfyui", "--out", tmp_path / "mine") == 1
    assert "is no file that ldmq export wrote" in complaint(capsys)
    assert run("export", tmp_path / "float", "--out", tmp_path / "a") == 2
    assert "--comfyui" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"float", "mine"}
