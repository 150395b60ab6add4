"""diffusers' own tools on quantized models: IP-Adapter, image projections, single files, the memory footprint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from safetensors.torch import save_file
from torch import Tensor

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.diffusers import LdmqConfig
from ldmq_kernels.nn import QuantConv2d, QuantLinear
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.plan import uniform_plan
from python_tests.tiny import SHALLOW, TEXT_WIDTH, run_unet, tiny_unet, unet_inputs

CLIP_WIDTH, IMAGE_TOKENS = 16, 4


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def with_ip_adapter(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """An IP-Adapter of random weights, by diffusers' own loader."""
    projection = {
        "proj.weight": 0.2 * random(IMAGE_TOKENS * TEXT_WIDTH, CLIP_WIDTH),
        "proj.bias": 0.2 * random(IMAGE_TOKENS * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }
    crossed = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    widths = [unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in crossed]
    pairs = {
        f"{2 * index + 1}.to_{part}_ip.weight": 0.2 * random(width, TEXT_WIDTH)
        for index, width in enumerate(widths)
        for part in ("k", "v")
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": pairs}], low_cpu_mem_usage=False)
    return unet


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_prompt_counts_after_quantizing(dtype: torch.dtype) -> None:
    unet = with_ip_adapter(tiny_unet(**SHALLOW)).to(dtype)
    picture = {"added_cond_kwargs": {"image_embeds": [random(2, 1, CLIP_WIDTH).to(dtype)]}}
    with torch.no_grad():
        exact = unet(**unet_inputs(dtype), **picture).sample
        ldmq.quantize(unet, uniform_plan(unet, "w8a16"))
        assert unet.config.encoder_hid_dim_type == "ip_image_proj"
        assert sqnr_db(exact, unet(**unet_inputs(dtype), **picture).sample) > 30


def test_what_was_set_beside_the_entries_of_a_config_stays_and_the_entries_are_saved_as_they_were(
    tmp_path: Path,
) -> None:
    unet = tiny_unet(**SHALLOW)
    unet.config.mark, unet.config.sample_size = "mine", 12
    ldmq.quantize(unet, uniform_plan(unet, "w8a16"))
    assert (unet.config.mark, unet.config.sample_size, unet.config["sample_size"]) == ("mine", 12, 8)
    assert unet.config.quantization_config is unet.config["quantization_config"]
    unet.save_pretrained(tmp_path)
    assert UNet2DConditionModel.load_config(tmp_path)["sample_size"] == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_image_projection_casts_to_the_dtype_of_its_weight(dtype: torch.dtype) -> None:
    unet = tiny_unet(**SHALLOW, encoder_hid_dim=CLIP_WIDTH, encoder_hid_dim_type="image_proj").to(dtype)
    call = unet_inputs(dtype) | {"encoder_hidden_states": None}
    call["added_cond_kwargs"] = {"image_embeds": random(2, CLIP_WIDTH)}  # float32, as a CLIP of its own gives them
    with torch.no_grad():
        exact = unet(**call).sample
        ldmq.quantize(unet, uniform_plan(unet, "w8a8-dynamic"))
        assert sqnr_db(exact, unet(**call).sample) > 20


def test_processors_of_custom_diffusion_cast_to_the_dtype_of_their_weights() -> None:
    unet = tiny_unet(**SHALLOW)
    processors = dict(unet.attn_processors)
    for name in processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            torch.manual_seed(5)
            processors[name] = CustomDiffusionAttnProcessor2_0(
                train_kv=True, train_q_out=True, hidden_size=width, cross_attention_dim=TEXT_WIDTH
            )
    unet.set_attn_processor(processors)
    exact = run_unet(unet)
    ldmq.quantize(unet, uniform_plan(unet, "w8a16"))
    assert sqnr_db(exact, run_unet(unet)) > 30


def test_a_single_file_is_quantized_while_it_is_loaded(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "unet")
    save_file({name: t.contiguous() for name, t in unet.state_dict().items()}, tmp_path / "all.safetensors")
    ldmq.quantize(unet, uniform_plan(unet, "w8a8-dynamic"))
    loaded = UNet2DConditionModel.from_single_file(
        str(tmp_path / "all.safetensors"),
        config=str(tmp_path / "unet"),
        local_files_only=True,
        quantization_config=LdmqConfig("w8a8-dynamic"),
    )
    assert torch.equal(run_unet(loaded), run_unet(unet))
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


def test_the_memory_footprint_is_that_of_the_tensors() -> None:
    unet = tiny_unet()
    ldmq.quantize(unet, uniform_plan(unet, "w8a8-dynamic"))
    held = [module.packed_weight.nbytes for module in unet.modules() if isinstance(module, QuantLinear | QuantConv2d)]
    floats = [tensor.nbytes for tensor in unet.state_dict().values() if tensor.dtype != torch.int8]
    assert unet.get_memory_footprint() == sum(held) + sum(floats)
