"""config.json says what the tensors beside it are: what changes rightly loads, everything else is refused by name."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from ldmq_kernels.integrations.diffusers import CheckpointError, LdmqConfig
from ldmq_kernels.plans.plan import PlanError
from python_tests.mutations.checkpoints import CONFIG, FILE, SHARD, saves
from python_tests.tiny import SHALLOW, run_unet, tiny_unet

NORM = "conv_norm_out.weight"
Model = UNet2DConditionModel


def load(folder: Path, **options: object) -> Model:
    return UNet2DConditionModel.from_pretrained(folder, **options)


def said(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())["quantization_config"]["checksums"]["tensors"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    saves(folder)
    return folder


@pytest.fixture
def whole(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint in one file, to be damaged."""
    return Path(shutil.copytree(saved / "whole", tmp_path / "whole"))


@pytest.fixture
def unet(saved: Path) -> Model:
    return load(saved / "whole")


def edit(file: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# -- what may change ---------------------------------------------------------------------------------


def test_every_tensor_has_a_checksum_and_no_adapter_has(saved: Path) -> None:
    assert said(saved / "whole").keys() == load_file(saved / "whole" / FILE).keys()
    assert said(saved / "whole") == said(saved / "shards")


@pytest.mark.parametrize("save", ["whole", "shards"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_is_taken_while_loading(saved: Path, save: str, dtype: torch.dtype) -> None:
    assert load(saved / save, torch_dtype=dtype).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_that_were_made_narrower_elsewhere_are_taken_and_compared(whole: Path, dtype: torch.dtype) -> None:
    floats = [name for name, checksums in said(whole).items() if isinstance(checksums, dict)]
    assert len(floats) > 20
    edit(whole / FILE, lambda tensors: tensors.update({name: tensors[name].to(dtype) for name in floats}))
    assert torch.equal(run_unet(load(whole, torch_dtype=dtype), dtype), run_unet(load(whole).to(dtype), dtype))
    edit(whole / FILE, lambda tensors: tensors[NORM].view(torch.int16)[3:4].bitwise_xor_(1))
    with pytest.raises(CheckpointError, match=f"{NORM} is not what config.json was saved with"):
        load(whole)


def test_a_variant_in_half_precision_lies_beside_the_float_one(unet: Model, tmp_path: Path) -> None:
    unet.save_pretrained(tmp_path)
    before = run_unet(unet)
    unet.half().save_pretrained(tmp_path, variant="fp16")
    assert torch.equal(run_unet(load(tmp_path)), before)
    assert torch.equal(
        run_unet(load(tmp_path, variant="fp16", torch_dtype=torch.half), torch.half), run_unet(unet, torch.half)
    )


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(unet: Model, tmp_path: Path) -> None:
    unet.save_pretrained(tmp_path / "unet", variant="fp16")
    for options in ({}, {"variant": "bf16"}):
        with pytest.raises(OSError, match=r"it holds unet \(fp16\): give a variant that is there"):
            load(tmp_path, subfolder="unet", **options)
    assert torch.equal(run_unet(load(tmp_path, subfolder="unet", variant="fp16")), run_unet(unet))


def test_a_pickled_checkpoint_is_compared_too(unet: Model, tmp_path: Path) -> None:
    unet.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(run_unet(load(tmp_path, use_safetensors=False)), run_unet(unet))
    (file,) = tmp_path.glob("*.bin")
    tensors = torch.load(file, weights_only=True)
    tensors[NORM][3] += 1
    torch.save(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{NORM} is not what config.json was saved with.*\({file.name}\)"):
        load(tmp_path, use_safetensors=False)


def test_a_model_with_an_adapter_saves_the_model_without_it(unet: Model, tmp_path: Path) -> None:
    before = run_unet(unet)
    unet.add_adapter(LoraConfig(target_modules=["to_q", "conv1"], init_lora_weights=False))
    assert not torch.equal(run_unet(unet), before)
    unet.save_pretrained(tmp_path)
    assert torch.equal(run_unet(load(tmp_path)), before)


# -- what a save says is what is saved ------------------------------------------------------------------


def changed(unet: Model) -> Model:
    with torch.no_grad():
        unet.get_submodule("conv_norm_out").weight.mul_(1.5)
    return unet


@pytest.mark.parametrize(
    "change",
    [
        changed,
        lambda unet: unet.to(torch.bfloat16),
        lambda unet: changed(copy.deepcopy(unet)),
        lambda unet: changed(pickle.loads(pickle.dumps(unet))),
    ],
    ids=["a norm", "dtype", "copy", "pickle"],
)
def test_a_model_that_changed_since_it_was_loaded_saves_what_it_is_now(
    unet: Model, change: Callable[[Model], Model], tmp_path: Path
) -> None:
    unet.save_pretrained(tmp_path / "before")
    unet.register_to_config(upcast_attention=None)  # diffusers makes JSON of the entries that a save has written
    now = change(unet)
    now.save_pretrained(tmp_path / "now")
    again = load(tmp_path / "now", torch_dtype=now.dtype)
    assert torch.equal(run_unet(again, now.dtype), run_unet(now, now.dtype))
    assert said(tmp_path / "now") != said(tmp_path / "before")


def test_a_model_that_could_not_be_loaded_is_not_saved(unet: Model, tmp_path: Path) -> None:
    with torch.no_grad():
        unet.get_parameter(NORM)[3] = float("inf")
    with pytest.raises(CheckpointError, match=f"{NORM} holds NaN or infinite values"):
        unet.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# -- what does not belong together ------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["others", "weights"])
def test_the_config_of_another_save_is_refused(saved: Path, whole: Path, other: str) -> None:
    shutil.copy(saved / other / CONFIG, whole / CONFIG)
    with pytest.raises(CheckpointError, match=r"of two saves|was saved with"):
        load(whole)


@pytest.mark.parametrize("old", ["whole", "shards"])
def test_a_save_over_an_older_one_that_stops_anywhere_leaves_the_older_one(
    saved: Path, tmp_path: Path, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After config.json, and after each shard."""
    newer, before = load(saved / "weights"), run_unet(load(saved / old))
    for written in range(3):
        folder = Path(shutil.copytree(saved / old, tmp_path / str(written)))
        left = iter(range(written))

        def stopping(*args: object, left=left, **kwargs: object) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            save_file(*args, **kwargs)

        monkeypatch.setattr("safetensors.torch.save_file", stopping)
        with pytest.raises(KeyboardInterrupt):
            newer.save_pretrained(folder, max_shard_size="60KB")
        monkeypatch.undo()
        assert torch.equal(run_unet(load(folder)), before)


def test_a_config_without_checksums_is_refused_where_the_tensors_were_saved_with_them(whole: Path) -> None:
    config = json.loads((whole / CONFIG).read_text())
    del config["quantization_config"]["checksums"]
    (whole / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{FILE} was saved with checksums"):
        load(whole)
    edit(whole / FILE, lambda _: None)  # without the mark, as an older release wrote it
    load(whole)


def without_checksums(folder: Path, change: Callable[[dict], object]) -> None:
    """As an older release wrote it."""
    config = json.loads((folder / CONFIG).read_text())
    del config["quantization_config"]["checksums"]
    change(config["quantization_config"]["plan"])
    (folder / CONFIG).write_text(json.dumps(config))
    edit(folder / FILE, lambda _: None)


def test_without_checksums_tensors_that_no_plan_announces_and_other_scales_are_refused(whole: Path) -> None:
    without_checksums(whole, lambda plan: plan["smoothing"].pop("conv_in"))
    with pytest.raises(CheckpointError, match=r"conv_in: smoothing is in the file, and nothing in config.json says"):
        load(whole)


def test_without_checksums_scales_that_are_not_the_plan_s_are_refused(whole: Path) -> None:
    layer = next(name for name in said(whole) if name.endswith("input_scale")).removesuffix(".input_scale")

    def times_50(plan: dict) -> None:
        scale = plan["input_scales"][layer]
        plan["input_scales"][layer] = [50 * s for s in scale] if isinstance(scale, list) else 50 * scale

    without_checksums(whole, times_50)
    with pytest.raises(CheckpointError, match=rf"{layer}: input_scale is .*, the plan in config.json says"):
        load(whole)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (NORM, float("nan"), f"{NORM} holds a value that is not finite"),
        ("conv_in.bias", float("inf"), "conv_in.bias holds a value that is not finite"),
        ("conv_in.input_scale", 1e-42, "conv_in: input_scale holds a value that is not finite and positive"),
    ],
)
def test_without_checksums_numbers_that_no_model_has_are_refused(
    whole: Path, name: str, value: float, words: str
) -> None:
    without_checksums(whole, lambda _: None)
    edit(whole / FILE, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    with pytest.raises(CheckpointError, match=words):
        load(whole)


def test_without_checksums_integers_where_a_float_is_expected_are_refused(whole: Path) -> None:
    without_checksums(whole, lambda _: None)
    edit(whole / FILE, lambda tensors: tensors.update({NORM: tensors[NORM].int()}))
    with pytest.raises(CheckpointError, match=f"{NORM} is torch.int32, a floating dtype is needed"):
        load(whole)


@pytest.mark.parametrize("plan", ["/dev/zero", "plan.json", ["x"], 3])
def test_a_plan_in_config_json_that_is_no_object_is_refused_unopened(whole: Path, plan: object) -> None:
    config = json.loads((whole / CONFIG).read_text())
    config["quantization_config"]["plan"] = plan
    (whole / CONFIG).write_text(json.dumps(config))
    with pytest.raises(PlanError, match="an object is needed"):
        load(whole)


def test_an_entry_that_is_unknown_is_refused_by_name(whole: Path) -> None:
    config = json.loads((whole / CONFIG).read_text())
    config["quantization_config"]["trust"] = True
    (whole / CONFIG).write_text(json.dumps(config))
    with pytest.raises(PlanError, match="unknown entry 'trust'"):
        load(whole)


# -- shards, float ones too ----------------------------------------------------------------------------------


@pytest.fixture(params=["quantized", "float"])
def shards(request: pytest.FixtureRequest, saved: Path, tmp_path: Path) -> tuple[Path, dict]:
    """A checkpoint in shards, and how it is loaded: one that is quantized, and one that is while it loads."""
    if request.param == "quantized":
        return Path(shutil.copytree(saved / "shards", tmp_path / "shards")), {"device_map": "cpu"}
    tiny_unet(**SHALLOW).save_pretrained(tmp_path, max_shard_size="100KB")
    return tmp_path, {"device_map": "cpu", "quantization_config": LdmqConfig("w8a8-dynamic")}


def test_a_shard_with_the_contents_of_another_is_refused(shards: tuple[Path, dict]) -> None:
    folder, options = shards
    files = sorted(folder.glob(SHARD))
    assert len(files) > 2
    shutil.copy(files[0], files[1])
    with pytest.raises(CheckpointError, match=rf"is in two files, of which {files[1].name} is the second"):
        load(folder, **options)


def test_a_shard_that_lacks_a_tensor_of_the_index_is_refused(shards: tuple[Path, dict]) -> None:
    folder, options = shards
    files = sorted(folder.glob(SHARD))
    name = sorted(load_file(files[0]))[0]
    edit(files[0], lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"{files[-1].name} was the last file and {name} is in none"):
        load(folder, **options)
