"""An index of shards that is damaged is refused by its name before a tensor is loaded, wherever diffusers reads one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

import ldmq_kernels as ldmq
from ldmq_kernels.cli.models import load_structure
from ldmq_kernels.integrations.diffusers import CheckpointError, LdmqConfig
from python_tests.mutations.checkpoints import INDEX
from python_tests.tiny import SHALLOW, tiny_unet

Model = UNet2DConditionModel
SHARDED = {"max_shard_size": "100KB"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model and a quantized one, in shards."""
    folder = tmp_path_factory.mktemp("saved")
    unet = tiny_unet(mid_block_type=None, **SHALLOW)
    unet.save_pretrained(folder / "float", **SHARDED)
    ldmq.quantize(unet, scheme="w8a8-dynamic").save_pretrained(folder / "quantized", max_shard_size="60KB")
    return folder


@pytest.fixture(params=["float", "quantized", "quantized while loading"])
def shards(request: pytest.FixtureRequest, saved: Path, tmp_path: Path) -> tuple[Path, dict]:
    """A folder and how it is loaded."""
    folder = Path(shutil.copytree(saved / request.param.split()[0], tmp_path / "model"))
    is_later = request.param.endswith("loading")
    return folder, {"quantization_config": LdmqConfig("w8a8-dynamic")} if is_later else {}


def nothing_is_loaded(*_: object, **__: object) -> None:
    raise AssertionError("a tensor is loaded")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not a JSON file"),
        ("", "is not a JSON file"),
        ("[]", "holds no JSON object"),
        ("[" * 100_000, "is not a JSON file"),
        ("{}", "its metadata is no object"),
        ('{"metadata": {}, "weight_map": ["x"]}', "its weight_map is no object"),
        ('{"metadata": {}, "weight_map": {"conv_in.weight": 3}}', "conv_in.weight is in '?3"),
        ('{"metadata": {}, "weight_map": {"conv_in.weight": "../x.safetensors"}}', "conv_in.weight is in '../x"),
        ('{"metadata": {"ldmq_checksums": ""}, "weight_map": {"conv_in.weight": ".."}}', "conv_in.weight is in '..'"),
    ],
)
def test_an_index_that_is_none_is_named(
    text: str, words: str, shards: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, options = shards
    (folder / INDEX).write_text(text)
    monkeypatch.setattr("diffusers.models.modeling_utils.load_state_dict", nothing_is_loaded)
    with pytest.raises(CheckpointError, match=words) as raised:
        Model.from_pretrained(folder, **options)
    assert INDEX in str(raised.value)


def test_an_index_that_is_cut_anywhere_is_named(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "quantized", tmp_path / "model"))
    content = (folder / INDEX).read_bytes()
    for size in range(0, len(content) - 2, len(content) // 10):
        (folder / INDEX).write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=INDEX):
            Model.from_pretrained(folder)


def edited(folder: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    edit(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def test_a_tensor_that_an_index_has_twice_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "quantized", tmp_path / "model"))
    content = (folder / INDEX).read_text()
    (folder / INDEX).write_text(content.replace('"weight_map": {', '"weight_map": {"conv_in.bias": "x.safetensors",'))
    with pytest.raises(CheckpointError, match=rf"{INDEX}.*conv_in\.bias.*twice"):
        Model.from_pretrained(folder)


def test_a_shard_that_is_not_there_is_named(shards: tuple[Path, dict]) -> None:
    folder, options = shards
    edited(folder, lambda names: names.update({"conv_in.weight": "elsewhere.safetensors"}))
    with pytest.raises(
        OSError, match=rf"{INDEX} says that conv_in.weight is in 'elsewhere.safetensors', and there is no"
    ):
        Model.from_pretrained(folder, **options)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_shard_that_is_cut_is_named(size: int, shards: tuple[Path, dict]) -> None:
    folder, options = shards
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises((OSError, CheckpointError), match=shard.name):
        Model.from_pretrained(folder, **options)


def test_a_config_that_is_cut_is_named(shards: tuple[Path, dict]) -> None:
    """By diffusers, and by the command line, which reads it first."""
    folder, options = shards
    content = (folder / "config.json").read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 3):
        (folder / "config.json").write_bytes(content[:size])
        with pytest.raises(OSError, match=r"model/config\.json.* is not a valid JSON file"):
            Model.from_pretrained(folder, **options)
        with pytest.raises(ValueError, match=r"model/config\.json is not a JSON file"):
            load_structure(folder)


def test_an_index_in_an_archive_is_left_to_diffusers(tmp_path: Path) -> None:
    """As diffusers before 0.38 reads DDUF files; the names there are no files."""
    from ldmq_kernels.integrations.diffusers.saving import _shard_files

    def find(pretrained_model_name_or_path: str, index_filename: str) -> str:
        return index_filename

    archive = str(tmp_path / "model.dduf")
    assert _shard_files(find, None, (archive, "unet/" + INDEX), {}) == "unet/" + INDEX
