"""A checkpoint that does not hold what its config.json says is refused, naming the layer or the file."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.diffusers import CheckpointError
from ldmq_kernels.integrations.diffusers.integrity import plan_checksum
from ldmq_kernels.plans.plan import VERSION, PlanError
from python_tests.tiny import mixed_plan, tiny_unet

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    unet = tiny_unet()
    ldmq.quantize(unet, mixed_plan(unet))
    unet.save_pretrained(tmp_path)
    return tmp_path


def edit_tensors(folder, edit):
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def edit_plan(folder, edit):
    """Another plan, which says of itself that it is the saved one."""
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"]["plan"])
    config["quantization_config"]["checksums"]["plan"] = plan_checksum(config["quantization_config"]["plan"])
    (folder / "config.json").write_text(json.dumps(config))


def load(folder, **options):
    return UNet2DConditionModel.from_pretrained(folder, **options)


def first(folder, leaf, contains=""):
    return next(name for name in sorted(load_file(folder / FILE)) if name.endswith(f".{leaf}") and contains in name)


@pytest.mark.parametrize(
    ("leaf", "value", "options"),
    [
        ("weight_scale", float("nan"), {}),
        ("weight_scale", 0.0, {"device_map": "cpu", "torch_dtype": torch.float16}),
        ("group_scale", float("inf"), {}),
        ("input_scale", 0.0, {}),
        ("input_scale", float("nan"), {"device_map": "cpu"}),
        ("smoothing", -1.0, {}),
    ],
)
def test_a_scale_that_is_not_finite_and_positive_is_named(folder, leaf, value, options):
    name = first(folder, leaf)
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(CheckpointError, match=rf"{name.rpartition('.')[0]}: {leaf} holds a value that is not finite"):
        load(folder, **options)


@pytest.mark.parametrize("value", [0, 19])
def test_a_group_multiplier_out_of_range_is_named(folder, value):
    name = first(folder, "multiplier")
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(CheckpointError, match=r"multiplier holds a value that is not in 1\.\.18"):
        load(folder)


def test_integers_that_quantization_never_gives_are_named(folder):
    def spoil(tensors):
        tensors["conv_in.weight"].view(-1)[0] = -128

    edit_tensors(folder, spoil)
    with pytest.raises(CheckpointError, match=r"conv_in: weight holds a value that is not in \[-127, 127\]"):
        load(folder)


def test_a_missing_tensor_is_named_whether_quantized_or_not(folder):
    for name in (first(folder, "input_scale"), "conv_norm_out.weight", first(folder, "bias")):
        tensors = load_file(folder / FILE)
        kept = tensors.pop(name)
        save_file(tensors, folder / FILE, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"the checkpoint has no {name}"):
            load(folder)
        save_file(tensors | {name: kept}, folder / FILE, metadata={"format": "pt"})
    load(folder)


def test_a_missing_shard_file_is_named(tmp_path):
    unet = tiny_unet()
    ldmq.quantize(unet, mixed_plan(unet))
    unet.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        load(tmp_path)


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "smoothing", "input_scale"])
def test_a_misshapen_tensor_is_named_with_both_shapes(folder, leaf):
    name = first(folder, leaf, "attn" if leaf != "weight" else "conv_in")

    def cut(tensors):
        tensors[name] = torch.cat((tensors[name], tensors[name]))

    edit_tensors(folder, cut)
    with pytest.raises(CheckpointError, match=rf"{name} has shape .* in the checkpoint, .* is needed"):
        load(folder)


def test_a_tensor_of_another_dtype_is_named(folder):
    name = first(folder, "weight_scale")
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].half()}))
    with pytest.raises(CheckpointError, match=r"weight_scale is torch.float16, torch.float32 is needed"):
        load(folder)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(folder, part):
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: int(len(content) * part)])
    with pytest.raises(OSError, match=FILE):
        load(folder)


def test_a_plan_of_a_newer_version_is_refused(folder):
    edit_plan(folder, lambda plan: plan.update(ldmq_plan=VERSION + 1))
    with pytest.raises(PlanError, match=rf"quantization_config has plan version {VERSION + 1}, .*upgrade ldmq_kernels"):
        load(folder)


def test_a_plan_edited_into_nonsense_is_refused(folder):
    edit_plan(folder, lambda plan: plan["exceptions"].update(no_such_layer={"scheme": "fp16"}))
    with pytest.raises(PlanError, match="names a layer 'no_such_layer'"):
        load(folder)
    edit_plan(folder, lambda plan: plan.update(exceptions={"conv_in": {"scheme": "w3a3"}}))
    with pytest.raises(PlanError, match="w3a3"):
        load(folder)


def test_a_float_weight_under_a_quantized_plan_is_refused(folder):
    """As after copying the config.json of a quantized model beside float weights."""
    tiny_unet().save_pretrained(folder.parent / "float")
    (folder / FILE).write_bytes((folder.parent / "float" / FILE).read_bytes())
    with pytest.raises(CheckpointError, match="the checkpoint has no"):
        load(folder)


def test_layers_on_disk_are_refused_by_name(folder, tmp_path):
    with pytest.raises(ValueError, match="device_map puts down_blocks on disk"):
        load(folder, device_map={"": "cpu", "down_blocks": "disk"}, offload_folder=str(tmp_path / "offload"))
    with pytest.raises(ValueError, match="device_map puts the whole model on disk"):
        load(folder, device_map="auto", max_memory={"cpu": "5KB"})
