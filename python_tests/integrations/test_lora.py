"""LoRA through PEFT on quantized layers: the adapter adds in float what it would add to the float layer."""

from __future__ import annotations

import copy

import pytest
import torch

import ldmq_kernels as ldmq
from ldmq_kernels.conversion import ConversionError
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.plan import model_record, uniform_plan
from python_tests.tiny import PROMPTS, draw, mixed_plan, run_unet, tiny_pipeline, tiny_unet

peft = pytest.importorskip("peft")

FILE = {"prefix": None, "adapter_name": "style", "weight_name": "pytorch_lora_weights.safetensors"}
TARGETS = ["to_q", "to_v", "conv1", "proj_in", "ff.net.2"]


def add_adapter(unet, seed=5, name="style"):
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    mark = f".{name}."
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name and mark in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return unet


@pytest.fixture
def lora_folder(tmp_path):
    """A LoRA file as a trainer of the float pipeline writes it."""
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    add_adapter(pipe.unet)
    pipe.unet.save_lora_adapter(tmp_path / "lora", adapter_name="style", safe_serialization=True)
    return tmp_path / "lora"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_changes_the_quantized_model_as_it_changes_the_float_one(dtype):
    float_unet, unet = tiny_unet().to(dtype), tiny_unet().to(dtype)
    ldmq.quantize(unet, uniform_plan(unet, "w8a16"))
    base, quantized_base = run_unet(float_unet, dtype), run_unet(unet, dtype)
    with_adapter, quantized_with = run_unet(add_adapter(float_unet), dtype), run_unet(add_adapter(unet), dtype)
    assert quantized_with.dtype == dtype
    assert sqnr_db(base, with_adapter) < 20
    assert sqnr_db(with_adapter, quantized_with) > 30
    unet.disable_adapters()
    assert torch.equal(run_unet(unet, dtype), quantized_base)


def test_a_lora_file_loads_into_a_quantized_pipeline_of_every_scheme(lora_folder, tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    ldmq.quantize(pipe, mixed_plan(pipe.unet))
    before = draw(pipe)
    pipe.unet.load_lora_adapter(lora_folder, **FILE)
    adapted = draw(pipe)
    assert bool(torch.isfinite(adapted).all())
    assert not torch.equal(adapted, before)
    pipe.unet.delete_adapters("style")
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), before)


def test_a_model_is_quantized_below_a_loaded_adapter_which_stays_and_can_go(lora_folder, tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    plan = mixed_plan(pipe.unet)
    ldmq.quantize(pipe, plan)
    plain = draw(pipe)
    pipe.unet.load_lora_adapter(lora_folder, **FILE)
    wanted, summary = draw(pipe), ldmq.conversion.summarize(pipe.unet)

    below = tiny_pipeline(tmp_path / "tokenizer")
    below.unet.load_lora_adapter(lora_folder, **FILE)
    trainable = {name for name, p in below.unet.named_parameters() if p.requires_grad and "lora_" in name}
    assert model_record(below.unet) == plan.model
    ldmq.quantize(below, plan)
    assert torch.equal(draw(below), wanted)
    assert ldmq.conversion.summarize(below.unet) == summary
    assert trainable == {name for name, p in below.unet.named_parameters() if p.requires_grad}
    below.unload_lora_weights()
    assert torch.equal(draw(below), plain)


@pytest.mark.slow
def test_a_plan_made_with_a_lora_loaded_names_the_layers_without_it_and_holds_with_it(lora_folder, shallow_pipe):
    pipe = copy.copy(shallow_pipe)
    pipe.unet = add_adapter(copy.deepcopy(shallow_pipe.unet))
    exact = run_unet(pipe.unet)
    settings = {"num_inference_steps": 1, "height": 16, "width": 16, "formats": ["w8a8-static", "fp16"]}
    plan = ldmq.plan(pipe, PROMPTS * 2, target_sqnr_db=25, **settings)
    assert plan.model["layers"] == len(uniform_plan(shallow_pipe.unet, "w8a16").layers(shallow_pipe.unet))
    ldmq.quantize(pipe, plan)
    assert sqnr_db(exact, run_unet(pipe.unet)) > 23
    assert any(isinstance(module, QuantizedLayer) for module in pipe.unet.modules())
    plain = copy.deepcopy(shallow_pipe.unet)
    ldmq.quantize(plain, plan)
    pipe.unet.delete_adapters("style")
    assert torch.equal(run_unet(pipe.unet), run_unet(plain))


def test_quantizing_over_a_fused_adapter_is_refused_and_works_once_it_is_unloaded(lora_folder, tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    pipe.unet.load_lora_adapter(lora_folder, **FILE)
    pipe.fuse_lora(components=["unet"])
    with pytest.raises(ConversionError, match=r"down_blocks.*adapter fused into its weight.*unload_lora_weights"):
        ldmq.quantize(pipe, scheme="w8a16")
    pipe.unload_lora_weights()
    fused = run_unet(pipe.unet)
    ldmq.quantize(pipe, uniform_plan(pipe.unet, "w8a16"))
    assert sqnr_db(fused, run_unet(pipe.unet)) > 30


def test_two_adapters_with_scales_add_what_they_add_to_the_float_model(tmp_path):
    unets = tiny_unet(), tiny_unet()
    ldmq.quantize(unets[1], scheme="w8a16")
    plain = run_unet(unets[1])
    for unet in unets:
        add_adapter(unet)
        add_adapter(unet, seed=6, name="other")
        unet.set_adapters(["style", "other"], [0.5, -1.25])
    both = run_unet(unets[0])
    assert sqnr_db(both, run_unet(unets[1])) > 30
    for unet in unets:
        unet.set_adapters(["other"], [1.0])
    one = run_unet(unets[0])
    assert sqnr_db(both, one) < 20
    assert sqnr_db(one, run_unet(unets[1])) > 30
    unets[1].delete_adapters(["style", "other"])
    assert torch.equal(run_unet(unets[1]), plain)


@pytest.mark.usefixtures("as_unfused")
def test_an_adapter_of_another_architecture_or_a_name_that_is_taken_changes_nothing(lora_folder, tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer", cross_attention_dim=32, block_out_channels=(16, 64))
    ldmq.quantize(pipe, scheme="w8a8-dynamic")
    before = draw(pipe)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_A"):
        pipe.unet.load_lora_adapter(lora_folder, **FILE)
    assert torch.equal(draw(pipe), before)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), before)
    assert not any(hasattr(module, "base_layer") for module in pipe.unet.modules())

    fits = tiny_unet()
    ldmq.quantize(fits, scheme="w8a8-dynamic")
    fits.load_lora_adapter(lora_folder, **FILE)
    with_it = run_unet(fits)
    with pytest.raises(ValueError, match="style already in use"):
        fits.load_lora_adapter(lora_folder, **FILE)
    assert torch.equal(run_unet(fits), with_it)


def test_a_quantized_model_is_saved_without_its_adapters_which_are_saved_beside_it(lora_folder, tmp_path):
    unet = tiny_unet()
    ldmq.quantize(unet, scheme="w8a8-dynamic")
    unet.load_lora_adapter(lora_folder, **FILE)
    adapted = run_unet(unet)
    unet.save_pretrained(tmp_path / "unet")
    unet.save_lora_adapter(tmp_path / "again", adapter_name="style", safe_serialization=True)
    loaded = type(unet).from_pretrained(tmp_path / "unet")
    loaded.load_lora_adapter(tmp_path / "again", **FILE)
    assert torch.equal(run_unet(loaded), adapted)


def test_an_adapter_loads_onto_layers_that_still_follow_the_timestep(lora_folder):
    unet = tiny_unet()
    plan = mixed_plan(unet)
    ldmq.quantize(unet, plan)
    unet.load_lora_adapter(lora_folder, **FILE)
    run_unet(unet)
    timestep = [m for m in unet.modules() if isinstance(m, QuantizedLayer) and m.scheme.has_timestep_scales]
    assert any(name.endswith("base_layer") and m in timestep for name, m in unet.named_modules())
    assert all(torch.equal(layer.call_scale, layer.input_scale[1:2]) for layer in timestep)
