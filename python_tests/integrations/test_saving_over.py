"""A quantized model is saved over an older one: the folder holds the older or the new one, whatever stops the save."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

import ldmq_kernels as ldmq
from ldmq_kernels.files import PART
from ldmq_kernels.integrations.diffusers.saving import finish_saves
from python_tests.files.places import content_of
from python_tests.tiny import SHALLOW, mixed_plan, run_unet, tiny_unet

SHARDED = {"max_shard_size": "60KB"}
MORE = {"max_shard_size": "30KB"}
CHANGES = {
    "one file": ({}, {}),
    "shards over one file": ({}, SHARDED),
    "one file over shards": (SHARDED, {}),
    "fewer shards": (MORE, SHARDED),
    "more shards": (SHARDED, MORE),
    "variant": ({"variant": "fp16", **SHARDED}, {"variant": "fp16"}),
    "pickled": ({"safe_serialization": False, **SHARDED}, {"safe_serialization": False}),
}
# of the user's: of the form of shards too, which no index names
USERS = {"notes.txt": b"mine", "diffusion_pytorch_model-00001-of-00009.safetensors": b"mine", "sub/config.json": b"{}"}
Model = UNet2DConditionModel


@pytest.fixture(scope="module")
def models() -> tuple[Model, Model]:
    """Two of the same shapes."""
    one, other = (tiny_unet(seed, mid_block_type=None, **SHALLOW) for seed in (0, 1))
    return ldmq.quantize(one, mixed_plan(one)), ldmq.quantize(other, mixed_plan(other))


def put_users(folder: Path) -> None:
    for name, content in USERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def users(tmp_path: Path) -> Path:
    put_users(tmp_path / "model")
    return tmp_path / "model"


def digests(folder: Path) -> dict[str, str]:
    """Of each file."""
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in content_of(folder).items()}


@pytest.mark.parametrize("change", CHANGES)
def test_a_save_over_another_leaves_what_a_save_alone_makes(
    change: str, models: tuple[Model, Model], users: Path, tmp_path: Path
) -> None:
    first, second = CHANGES[change]
    models[0].save_pretrained(users, **first)
    models[1].save_pretrained(users, **second)
    put_users(tmp_path / "alone")
    models[1].save_pretrained(tmp_path / "alone", **second)
    assert digests(users) == digests(tmp_path / "alone")
    assert content_of(users).items() >= USERS.items()


def test_one_model_is_saved_in_the_same_bytes_each_time(models: tuple[Model, Model], tmp_path: Path) -> None:
    for number in range(8):
        models[0].save_pretrained(tmp_path / str(number), **SHARDED)
        assert content_of(tmp_path / str(number)) == content_of(tmp_path / "0")
    for file in (tmp_path / "0").glob("*.safetensors"):
        assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 8 == 0


def test_what_is_in_another_variant_or_serialization_stays(models: tuple[Model, Model], tmp_path: Path) -> None:
    for options in ({"variant": "fp16", **SHARDED}, {"safe_serialization": False}, SHARDED):
        before = digests(tmp_path)
        models[0].save_pretrained(tmp_path, **options)
        assert digests(tmp_path).items() >= before.items()


def stops(monkeypatch: pytest.MonkeyPatch, moment: int) -> Iterator[int]:
    """Let nothing move files any more after so many moves, as in a process that was killed."""
    left = iter(range(moment))

    def ends(call: Callable[..., None]) -> Callable[..., None]:
        def move(*names: object) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            call(*names)

        return move

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, ends(getattr(os, name)))
    monkeypatch.setattr("ldmq_kernels.files.scratch._remove", lambda *_: None)
    monkeypatch.setattr(Path, "rmdir", lambda _: None)
    return left


@pytest.mark.parametrize("change", ["shards over one file", "one file over shards", "fewer shards"])
def test_a_save_that_is_killed_leaves_the_older_or_the_new_one_to_whoever_loads(
    change: str, models: tuple[Model, Model], tmp_path: Path
) -> None:
    wholes = []
    for model, options in zip(models, CHANGES[change], strict=True):
        folder = tmp_path / str(len(wholes))
        put_users(folder)
        model.save_pretrained(folder, **options)
        wholes.append(digests(folder))
    seen = []
    for moment in range(30):
        folder = Path(shutil.copytree(tmp_path / "0", tmp_path / f"killed {moment}"))
        with pytest.MonkeyPatch.context() as patch:
            left = stops(patch, moment)
            with contextlib.suppress(KeyboardInterrupt):
                models[1].save_pretrained(folder, **CHANGES[change][1])
        finish_saves(folder)
        found = {name: content for name, content in digests(folder).items() if not name.startswith(PART)}
        seen.append(wholes.index(found))
        if next(left, None) is not None:
            break
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}
    assert len(seen) < 30
    models[1].save_pretrained(folder, **CHANGES[change][1])
    assert digests(folder) == wholes[1]


@pytest.mark.parametrize("killed", ["model", "part"])
def test_a_killed_save_is_finished_by_a_load_of_the_model_or_of_what_it_is_in(
    killed: str, models: tuple[Model, Model], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pipe" / "unet"
    models[0].save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        stops(patch, 3)  # the older file away, the new ones complete, one of them in its place
        with pytest.raises(KeyboardInterrupt):
            models[1].save_pretrained(folder, **SHARDED)
    if killed == "model":
        loaded = Model.from_pretrained(tmp_path / "pipe", subfolder="unet")
        assert torch.equal(run_unet(loaded), run_unet(models[1]))
    else:
        (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "DiffusionPipeline"}')
        DiffusionPipeline.load_config(tmp_path / "pipe")
    models[1].save_pretrained(tmp_path / "alone", **SHARDED)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(tmp_path / "alone"))
    assert f"removed {folder}/{PART}" in caplog.text


def test_a_name_that_begins_with_a_tilde_is_no_home(
    models: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models[0].save_pretrained("~/model")
    assert "~/model/config.json" in content_of(tmp_path)


def test_the_hub_gets_the_new_files_under_the_folder_s_name(
    models: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = {}
    monkeypatch.setattr(
        "diffusers.models.modeling_utils.create_repo", lambda name, **_: type("Made", (), {"repo_id": name})
    )
    for name in ("load_or_create_model_card", "populate_model_card"):
        monkeypatch.setattr(
            f"diffusers.models.modeling_utils.{name}", lambda *_, **__: type("Card", (), {"save": lambda *_: None})()
        )
    monkeypatch.setattr(Model, "_upload_folder", lambda _, folder, name, **__: sent.update({name: os.listdir(folder)}))
    models[0].save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert {name: sorted(files) for name, files in sent.items()} == {
        "mine": ["config.json", "diffusion_pytorch_model.safetensors"]
    }
