"""The tensors of quantized layers and those of float layers are not taken for each other, wherever they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, PriorTransformer, UNet2DConditionModel, UNetMotionModel
from torch import nn

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.diffusers import CheckpointError
from ldmq_kernels.nn.state_dicts import refuse_integers
from python_tests.tiny import run_unet, same_bits, tiny_unet


@pytest.fixture(scope="module")
def quantized() -> UNet2DConditionModel:
    return ldmq.quantize(tiny_unet(), scheme="w8a8-dynamic")


@pytest.mark.parametrize("make", [ControlNetModel.from_unet, UNetMotionModel.from_unet2d])
def test_a_model_that_is_made_of_a_quantized_one_is_refused(make: Callable, quantized: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match=r"conv_in is quantized .* make it from the float model and quantize it then"):
        make(quantized)
    make(tiny_unet())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a8-dynamic", "fp8-dynamic", "w8a16", "w4a16"])
def test_float_linears_take_no_integers(scheme: str, strict: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    state_dict = ldmq.quantize(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), scheme=scheme).state_dict()
    before = model[0].weight.detach().clone()
    for given in (state_dict, dict(state_dict)):
        with pytest.raises(ValueError, match=r"0 is quantized in this state dict \(torch\.(u?int8|float8_e4m3fn) and"):
            model.load_state_dict(given, strict=strict)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("scheme", ["w8a16", "fp8-dynamic"])
def test_a_float_layer_takes_no_weights_whose_scale_is_not_there_either(scheme: str) -> None:
    """As where Custom Diffusion's processors are made from the tensors of `state_dict`."""
    layer, stored = nn.Linear(64, 64), ldmq.quantize(nn.Sequential(nn.Linear(64, 64)), scheme=scheme).state_dict()
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weight is torch\.\w+, .*without their scale.*`weight`, which is floating"):
        layer.load_state_dict({"weight": stored["0.weight"], "bias": stored["0.bias"]})
    assert torch.equal(layer.weight, before)


def test_a_float_layer_takes_a_weight_that_is_merely_cast_to_fp8() -> None:
    layer, weight = nn.Linear(8, 4), torch.randn(4, 8).to(torch.float8_e4m3fn)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(4)})
    assert torch.equal(layer.weight, weight.float())


@pytest.mark.parametrize("strict", [True, False])
def test_quantized_layers_take_no_float_weights(strict: bool, quantized: UNet2DConditionModel) -> None:
    before = run_unet(quantized)
    with pytest.raises(ValueError, match=r"conv_in\.weight is torch\.float32, .* quantize that with ldmq\.quantize"):
        quantized.load_state_dict(tiny_unet(1).state_dict(), strict=strict)
    assert torch.equal(run_unet(quantized), before)


@pytest.mark.parametrize(("given", "wanted"), [("fp8-dynamic", "w8a8-dynamic"), ("w8a8-dynamic", "fp8-dynamic")])
def test_quantized_layers_take_no_weights_of_another_format(given: str, wanted: str) -> None:
    stored, layer = (ldmq.quantize(nn.Sequential(nn.Linear(64, 64)), scheme=scheme) for scheme in (given, wanted))
    before = layer.state_dict()["0.weight"].clone()
    with pytest.raises(ValueError, match=r"0\.weight is torch\.\w+, torch\.\w+ is needed: is this .* another plan\?"):
        layer.load_state_dict(stored.state_dict())
    assert same_bits(layer.state_dict()["0.weight"], before)


def test_quantized_layers_take_their_own(quantized: UNet2DConditionModel) -> None:
    other = ldmq.quantize(tiny_unet(1), scheme="w8a8-dynamic")
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(run_unet(other), run_unet(quantized))


class OfAnother(nn.Linear):
    """Of another package, which calls its scale as this one does."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("weight_scale", torch.ones(8))


def test_what_other_packages_call_the_same_is_theirs() -> None:
    integers = {"weight": torch.ones(8, 8, dtype=torch.int8), "weight_scale": torch.ones(8), "bias": torch.ones(8)}
    OfAnother().load_state_dict(integers)
    hooked = nn.Linear(8, 8)
    hooked.register_load_state_dict_pre_hook(lambda *_: None)
    for layer in (OfAnother(), hooked, nn.Embedding(8, 8)):
        refuse_integers(layer, integers)
    with pytest.raises(ValueError, match="the layer is quantized"):
        refuse_integers(nn.Linear(8, 8), integers)


def test_tensors_of_a_quantized_model_beside_a_float_config_are_refused(tmp_path: Path) -> None:
    """As after the config.json of the float model was copied over it; no shape tells in a model of linears alone."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "embedding_dim": 32}
    model = PriorTransformer(num_embeddings=4, additional_embeddings=4, **sizes)
    ldmq.quantize(model, scheme="w8a8-dynamic").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors was saved with checksums"):
        PriorTransformer.from_pretrained(tmp_path)
