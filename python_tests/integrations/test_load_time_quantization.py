"""Quantizing a float checkpoint while it is loaded gives what loading and then quantizing gives."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import PipelineQuantizationConfig, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import ldmq_kernels as ldmq
from ldmq_kernels.conversion import ConversionError, summarize
from ldmq_kernels.integrations.diffusers import CheckpointError, LdmqConfig, LdmqQuantizer, register
from ldmq_kernels.plans.plan import PlanError, uniform_plan
from python_tests.tiny import draw, mixed_plan, run_unet, tiny_pipeline, tiny_unet


@pytest.fixture
def folder(tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a8-dynamic", "w8a16", "w4a16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scheme_without_calibration_is_applied_while_loading(folder, scheme, dtype):
    loaded = UNet2DConditionModel.from_pretrained(
        folder, torch_dtype=dtype, quantization_config=LdmqConfig(scheme=scheme)
    )
    expected = UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype)
    ldmq.quantize(expected, uniform_plan(expected, scheme))
    assert summarize(loaded) == summarize(expected)
    assert summarize(loaded).quantized_linears > 0
    assert torch.equal(run_unet(loaded, dtype), run_unet(expected, dtype))


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"device_map": "cpu"}], ids=str)
@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_a_full_plan_with_static_layers_is_applied_while_loading(tmp_path, options, shard):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path, max_shard_size=shard)
    plan = mixed_plan(unet)
    plan.save(tmp_path / "plan.json")
    config = LdmqConfig(plan=tmp_path / "plan.json")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=config, **options)
    ldmq.quantize(unet, plan)
    assert torch.equal(run_unet(loaded), run_unet(unet))


def test_what_was_quantized_while_loading_saves_and_loads(folder, tmp_path):
    loaded = UNet2DConditionModel.from_pretrained(folder, quantization_config=LdmqConfig("w8a8-dynamic"))
    loaded.save_pretrained(tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert config["plan"]["rules"] == [{"pattern": "*", "scheme": "w8a8-dynamic"}]
    again = UNet2DConditionModel.from_pretrained(tmp_path / "quantized")
    assert torch.equal(run_unet(again), run_unet(loaded))


def test_one_config_serves_several_models(folder, tmp_path):
    other = tiny_unet(block_out_channels=(32, 32))
    other.save_pretrained(tmp_path / "other")
    config = LdmqConfig("w8a16")
    for path in (folder, tmp_path / "other"):
        assert summarize(UNet2DConditionModel.from_pretrained(path, quantization_config=config)).quantized_linears > 0


def test_a_pipeline_takes_it_for_some_of_its_parts(tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    pipe.save_pretrained(tmp_path / "float")
    config = PipelineQuantizationConfig(
        quant_mapping={"unet": LdmqConfig(plan=mixed_plan(pipe.unet)), "vae": LdmqConfig("w8a16")}
    )
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=config)
    loaded.set_progress_bar_config(disable=True)
    ldmq.quantize(pipe.vae, uniform_plan(pipe.vae, "w8a16"))
    ldmq.quantize(pipe, mixed_plan(pipe.unet))
    assert torch.equal(draw(loaded), draw(pipe))


@pytest.mark.parametrize("scheme", ["w8a8-static", "w4a8-static"])
def test_a_static_scheme_says_that_it_needs_a_calibrated_plan(scheme):
    with pytest.raises(PlanError, match=rf"{scheme} needs activation scales.*`ldmq plan`.*w8a8-dynamic"):
        LdmqConfig(scheme=scheme)


@pytest.mark.parametrize("arguments", [{}, {"scheme": "int8"}, {"scheme": "w8a16", "plan": {}}, {"plan": {}}], ids=str)
def test_a_config_that_says_too_little_or_nonsense_is_refused(arguments):
    with pytest.raises(PlanError):
        LdmqConfig(**arguments)


def test_a_plan_for_another_model_is_refused_before_any_weight_is_read(folder):
    plan = uniform_plan(tiny_unet(block_out_channels=(32, 32)), "w8a16")
    with pytest.raises(PlanError, match="this plan is for a UNet2DConditionModel"):
        UNet2DConditionModel.from_pretrained(folder, quantization_config=LdmqConfig(plan=plan))


def test_a_float_checkpoint_with_nan_or_without_a_weight_is_refused_by_name(tmp_path):
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_out.weight[0, 0, 0, 0] = float("nan")
    unet.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="conv_out: the weight holds NaN"):
        UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=LdmqConfig("w8a16"))
    del unet.conv_out.bias
    unet.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"the checkpoint has no conv_out\.bias"):
        UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=LdmqConfig("w8a16"))


def test_a_model_loaded_quantized_is_not_quantized_again(folder):
    loaded = UNet2DConditionModel.from_pretrained(folder, quantization_config=LdmqConfig("w8a16"))
    with pytest.raises(ConversionError, match="is quantized already"):
        ldmq.quantize(loaded, uniform_plan(tiny_unet(), "w8a16"))


def test_registering_again_changes_nothing():
    register()
    register()
    assert AUTO_QUANTIZER_MAPPING["ldmq"] is LdmqQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["ldmq"] is LdmqConfig
    unet = tiny_unet()
    ldmq.quantize(unet, uniform_plan(unet, "w8a16"))
    assert isinstance(unet.hf_quantizer, LdmqQuantizer)
