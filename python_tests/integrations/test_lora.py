"""LoRA through PEFT on quantized layers: the adapter adds in float what it would add to the float layer."""

from __future__ import annotations

import pytest
import torch

import ldmq_kernels as ldmq
from ldmq_kernels.conversion import ConversionError
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.plan import uniform_plan
from python_tests.tiny import draw, mixed_plan, run_unet, tiny_pipeline, tiny_unet

peft = pytest.importorskip("peft")

FILE = {"prefix": None, "adapter_name": "style", "weight_name": "pytorch_lora_weights.safetensors"}
TARGETS = ["to_q", "to_v", "conv1", "proj_in", "ff.net.2"]


def add_adapter(unet, seed=5):
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), adapter_name="style")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
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


def test_fusing_an_adapter_into_integer_weights_is_refused_and_changes_nothing(lora_folder):
    unet = tiny_unet()
    ldmq.quantize(unet, uniform_plan(unet, "w8a8-dynamic"))
    unet.load_lora_adapter(lora_folder, **FILE)
    before = run_unet(unet)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        unet.fuse_lora()
    assert torch.equal(run_unet(unet), before)


def test_quantizing_under_a_loaded_adapter_is_refused_by_name_and_works_once_it_is_fused_or_gone(lora_folder, tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    plan = mixed_plan(pipe.unet)
    pipe.unet.load_lora_adapter(lora_folder, **FILE)
    before = draw(pipe)
    with pytest.raises(ConversionError, match=r"down_blocks.*has an adapter on it.*unload_lora_weights.*fuse_lora"):
        ldmq.quantize(pipe, plan)
    assert torch.equal(draw(pipe), before)
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    fused = run_unet(pipe.unet)
    ldmq.quantize(pipe, uniform_plan(pipe.unet, "w8a16"))
    assert sqnr_db(fused, run_unet(pipe.unet)) > 30


def test_an_adapter_loads_onto_layers_that_still_follow_the_timestep(lora_folder):
    unet = tiny_unet()
    plan = mixed_plan(unet)
    ldmq.quantize(unet, plan)
    unet.load_lora_adapter(lora_folder, **FILE)
    run_unet(unet)
    timestep = [m for m in unet.modules() if isinstance(m, QuantizedLayer) and m.scheme.has_timestep_scales]
    assert any(name.endswith("base_layer") and m in timestep for name, m in unet.named_modules())
    assert all(torch.equal(layer.call_scale, layer.input_scale[1:2]) for layer in timestep)
