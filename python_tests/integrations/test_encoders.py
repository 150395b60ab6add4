"""Text and image encoders of transformers keep their quantization when they are saved and loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import PipelineQuantizationConfig, StableDiffusionPipeline
from torch import Tensor, nn

import ldmq_kernels as ldmq
from ldmq_kernels.conversion import convert, summarize
from ldmq_kernels.integrations.diffusers import CheckpointError, LdmqConfig
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.tiny import draw, mixed_plan, same_bits

IDS = torch.tensor([[5, 6, 7, 8, 9, 1], [9, 8, 7, 1, 0, 0]])
MASK = (IDS > 0).long()


def clip_text() -> transformers.PreTrainedModel:
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=8, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config)


def t5(**changes: Any) -> transformers.PreTrainedModel:
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4} | changes
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=20, feed_forward_proj="gated-gelu", **settings))


def umt5() -> transformers.PreTrainedModel:
    config = transformers.UMT5Config(vocab_size=20, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return transformers.UMT5EncoderModel(config)


def gemma() -> transformers.PreTrainedModel:
    config = transformers.Gemma2Config(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma2Model(config)


def qwen_vl() -> transformers.PreTrainedModel:
    text = {
        "vocab_size": 20, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def clip_vision() -> transformers.PreTrainedModel:
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    return transformers.CLIPVisionModelWithProjection(config)


def siglip() -> transformers.PreTrainedModel:
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    return transformers.SiglipVisionModel(config)


ENCODERS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "clip text": clip_text,
    "t5": t5,
    "umt5": umt5,
    "gemma 2": gemma,
    "qwen 2.5 vl": qwen_vl,
    "clip vision": clip_vision,
    "siglip": siglip,
}


def built(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return ENCODERS[name]().eval()


@torch.no_grad()
def encode(model: nn.Module) -> Tensor:
    """What the encoder makes of two texts, or of two pictures, on the reference backend."""
    with dispatch.use_backend("reference"):
        if "vision" in type(model).__name__.lower():
            pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
            return model(pictures.to(model.dtype))[0]
        return model(input_ids=IDS, attention_mask=MASK)[0]


def quantized(model: nn.Module) -> int:
    return sum(isinstance(m, QuantizedLayer) and m.scheme.quantizes for m in model.modules())


@pytest.mark.parametrize("name", ENCODERS)
def test_a_saved_encoder_is_loaded_with_the_same_layers_and_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    model = built(name)
    exact = encode(model)
    ldmq.quantize(model, scheme="w8a8-dynamic")
    assert summarize(model).quantized_linears > 0
    out = encode(model)
    assert float(sqnr_db(exact, out)) > 25
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert quantized(loaded) == quantized(model)
    assert torch.equal(encode(loaded), out)
    again = loaded.state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(same_bits(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["clip text", "t5", "clip vision"])
def test_every_scheme_survives_in_shards_and_a_second_save(name: str, tmp_path: Path) -> None:
    model = built(name)
    plan = mixed_plan(model)
    plan.bias_correction = {layer: torch.full((32,), 0.01) for layer in list(plan.smoothing)[:1]}
    convert(model, plan)
    out = encode(model)
    model.save_pretrained(tmp_path / "first", max_shard_size="20KB")
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path / "first")
    assert torch.equal(encode(loaded), out)
    loaded.save_pretrained(tmp_path / "second")
    assert torch.equal(encode(type(model).from_pretrained(tmp_path / "second")), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_scales_and_what_stays_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    t5(d_model=32).save_pretrained(tmp_path / "float")
    model = transformers.T5EncoderModel.from_pretrained(tmp_path / "float", dtype=dtype)
    ldmq.quantize(model, scheme="w8a8-dynamic")
    out = encode(model)
    model.save_pretrained(tmp_path / "quantized")
    loaded = transformers.T5EncoderModel.from_pretrained(tmp_path / "quantized", dtype=dtype)
    layer = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert loaded.get_submodule(layer).weight_scale.dtype == torch.float32
    assert loaded.get_submodule(layer).weight.dtype == model.get_submodule(layer).weight.dtype
    assert torch.equal(encode(loaded), out)


def test_an_encoder_is_quantized_while_it_is_loaded(tmp_path: Path) -> None:
    model = built("t5")
    model.save_pretrained(tmp_path / "float")
    ldmq.quantize(model, scheme="w8a16")
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=LdmqConfig("w8a16"))
    assert torch.equal(encode(loaded), encode(model))
    loaded.save_pretrained(tmp_path / "quantized")
    assert torch.equal(encode(type(model).from_pretrained(tmp_path / "quantized")), encode(model))


@pytest.mark.parametrize("damage", ["plan", "checksum", "tensor"])
def test_a_damaged_checkpoint_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    model = built("t5")
    ldmq.quantize(model, scheme="w8a8-dynamic")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    checksums = config["quantization_config"]["checksums"]
    if damage == "plan":
        config["quantization_config"]["plan"]["rules"][0]["scheme"] = "w8a16"
    elif damage == "checksum":
        del config["quantization_config"]["checksums"]
    else:
        checksums["tensors"]["encoder.block.0.layer.0.SelfAttention.q.weight"] = "00000000"
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = {"plan": "not the one that", "checksum": "no plan with checksums", "tensor": "SelfAttention.q.weight"}
    with pytest.raises(CheckpointError, match=words[damage]):
        type(model).from_pretrained(tmp_path)


def test_a_pipeline_keeps_the_quantization_of_its_text_encoder(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    ldmq.quantize(pipe.unet, scheme="w8a8-dynamic")
    ldmq.quantize(pipe.text_encoder, scheme="w8a8-dynamic")
    pictures = draw(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert quantized(loaded.text_encoder) == quantized(pipe.text_encoder) > 0
    assert torch.equal(draw(loaded), pictures)


def test_a_text_encoder_has_a_plan_of_its_own(
    shallow_pipe: StableDiffusionPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = copy.copy(shallow_pipe)
    pipe.text_encoder = copy.deepcopy(shallow_pipe.text_encoder)
    given = {"part": "text_encoder", "formats": ["w8a8", "fp16"], "show_progress": False}
    drawn = {"num_inference_steps": 1, "height": 16, "width": 16}
    with pytest.raises(ValueError, match="text_encoder draws nothing itself: give target_sqnr_db"):
        ldmq.plan(pipe, ["a dog", "a cat"], target_latent_db=20, **given, **drawn)
    plan = ldmq.plan(pipe, ["a dog", "a cat"], target_sqnr_db=30, out=tmp_path / "plan.json", **given, **drawn)
    assert plan.model["part"] == "text_encoder"
    assert plan.measured["held_out_sqnr_db"] >= 30
    assert not any(layer_plan.scheme.has_timestep_scales for layer_plan in plan.layers(pipe.text_encoder).values())
    ldmq.quantize(pipe, tmp_path / "plan.json")
    assert quantized(pipe.text_encoder) > 0
    assert quantized(pipe.unet) == 0
    assert "stays in float" not in caplog.text
    pipe.text_encoder.save_pretrained(tmp_path / "encoder")
    loaded = type(pipe.text_encoder).from_pretrained(tmp_path / "encoder")
    assert torch.equal(encode(loaded), encode(pipe.text_encoder))


@pytest.mark.parametrize("way", ["mapping", "backend"])
def test_a_pipelines_components_are_quantized_while_they_are_loaded(
    pipe: StableDiffusionPipeline, way: str, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path)
    if way == "mapping":
        given = {"unet": LdmqConfig("w8a8-dynamic"), "text_encoder": LdmqConfig("w8a16")}
        config = PipelineQuantizationConfig(quant_mapping=given)
    else:
        config = PipelineQuantizationConfig(
            quant_backend="ldmq",
            quant_kwargs={"scheme": "w8a8-dynamic"},
            components_to_quantize=["unet", "text_encoder"],
        )
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, quantization_config=config)
    schemes = [
        {str(m.scheme) for m in model.modules() if isinstance(m, QuantizedLayer)}
        for model in (loaded.unet, loaded.text_encoder)
    ]
    assert schemes == [{"w8a8-dynamic"}, {"w8a16" if way == "mapping" else "w8a8-dynamic"}]
    assert quantized(loaded.vae) == 0
