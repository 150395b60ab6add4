"""What save_pretrained writes, from_pretrained gives back, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import ldmq_kernels as ldmq
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.plans.plan import VERSION
from python_tests.processes import run_each_anew
from python_tests.tiny import draw, mixed_plan, run_unet, same_bits, tiny_pipeline, tiny_unet


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    pipe = tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))
    return ldmq.quantize(pipe, mixed_plan(pipe.unet))


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


def quantized_tensors(model):
    return {
        name: tensor
        for layer_name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
        for name, tensor in layer.state_dict(prefix=f"{layer_name}.").items()
        if name.rpartition(".")[2] in layer.scheme.dtypes
    }


def assert_same_tensors(model, expected):
    found = quantized_tensors(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert same_bits(found[name], tensor), name


def test_the_folder_holds_safetensors_and_config_and_nothing_else(saved):
    assert sorted(path.name for path in (saved / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    config = json.loads((saved / "unet" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "ldmq"
    assert config["plan"]["ldmq_plan"] == VERSION
    assert set(config["plan"]["smoothing"].values()) == {""}


def test_the_file_holds_int4_packed_int8_and_fp8_weights_and_float32_scales(pipe, saved):
    stored = load_file(saved / "unet" / "diffusion_pytorch_model.safetensors")
    for name, layer in pipe.unet.named_modules():
        if isinstance(layer, QuantizedLayer):
            expected = {"w4": torch.uint8, "fp": torch.float8_e4m3fn}.get(str(layer.scheme)[:2], torch.int8)
            assert stored[f"{name}.weight"].dtype == expected
            scales = ("weight_scale", "group_scale", "input_scale", "smoothing")
            present = [f"{name}.{leaf}" for leaf in scales if f"{name}.{leaf}" in stored]
            assert present
            assert all(stored[leaf].dtype == torch.float32 for leaf in present)


DRAW = """
import torch
from diffusers import StableDiffusionPipeline
from python_tests.tiny import draw
pipe = StableDiffusionPipeline.from_pretrained({saved!r})
pipe.set_progress_bar_config(disable=True)
torch.save(draw(pipe), {images!r})
"""


@pytest.mark.slow
def test_a_new_process_draws_the_same_pictures_whichever_is_imported_first(pipe, saved, tmp_path):
    images = [tmp_path / "ldmq.pt", tmp_path / "diffusers.pt"]
    draw_to = [DRAW.format(saved=str(saved), images=str(file)) for file in images]
    orders = ("import ldmq_kernels, diffusers", "import diffusers.models, ldmq_kernels")
    run_each_anew([order + program for order, program in zip(orders, draw_to, strict=True)])
    for file in images:
        assert torch.equal(torch.load(file), draw(pipe)), file


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_keeps_integers_and_scales_and_gives_the_model_that_dtype(pipe, saved, dtype):
    unet = UNet2DConditionModel.from_pretrained(saved / "unet", torch_dtype=dtype)
    assert_same_tensors(unet, quantized_tensors(pipe.unet))
    assert unet.dtype == dtype
    floats = {p.dtype for p in unet.parameters() if p.is_floating_point()}
    assert floats == {dtype}
    assert run_unet(unet, dtype).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_pipeline_draws_the_same_pictures_after_a_round_trip(tmp_path, dtype):
    pipe = tiny_pipeline(tmp_path / "tokenizer").to(dtype)
    ldmq.quantize(pipe, mixed_plan(pipe.unet))
    pipe.save_pretrained(tmp_path / "saved")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), draw(pipe))


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"device_map": "balanced"},
        {"device_map": {"down_blocks": "cpu", "up_blocks": "cpu", "": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"disable_mmap": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_every_way_of_loading_gives_the_same_model(pipe, tmp_path, options, shard):
    pipe.unet.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard == "10GB" else len(list(tmp_path.iterdir())) - 2)
    assert shard == "10GB" or len(list(tmp_path.glob("*.safetensors"))) > 3
    unet = UNet2DConditionModel.from_pretrained(tmp_path, **options)
    assert_same_tensors(unet, quantized_tensors(pipe.unet))
    assert torch.equal(run_unet(unet), run_unet(pipe.unet))


def test_parallel_loading_of_shards_gives_the_same_model(pipe, tmp_path, monkeypatch):
    pipe.unet.save_pretrained(tmp_path, max_shard_size="100KB")
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    unet = UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(run_unet(unet), run_unet(pipe.unet))


def test_a_pipeline_loads_with_a_device_map(pipe, saved):
    again = StableDiffusionPipeline.from_pretrained(saved, device_map="cpu")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), draw(pipe))


def test_a_loaded_model_saves_the_same_files_again(saved, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(saved / "unet")
    unet.save_pretrained(tmp_path)
    first = load_file(saved / "unet" / "diffusion_pytorch_model.safetensors")
    second = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (saved / "unet", tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to(dtype=torch.half)])
def test_a_loaded_model_moves_to_another_dtype_and_keeps_its_scales(pipe, saved, move):
    unet = move(UNet2DConditionModel.from_pretrained(saved / "unet"))
    assert unet.dtype in (torch.float16, torch.bfloat16)
    assert_same_tensors(unet, quantized_tensors(pipe.unet))
    assert torch.equal(run_unet(unet.float()), run_unet(unet))


def test_a_quantized_vae_comes_back_too(tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    ldmq.quantize(pipe.vae, mixed_plan(pipe.vae))
    pipe.save_pretrained(tmp_path / "saved")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), draw(pipe))


def test_a_float_model_still_loads_as_before(tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path)
    assert torch.equal(run_unet(UNet2DConditionModel.from_pretrained(tmp_path)), run_unet(unet))
