"""A quantized model that is saved or uploaded has its card with it, and no path of this machine."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard

import ldmq_kernels as ldmq
from ldmq_kernels.conversion import summarize
from ldmq_kernels.integrations.diffusers.card import PICTURES
from python_tests.integrations.hub import Hub, running_hub
from python_tests.tiny import SHALLOW, mixed_plan, tiny_pipeline

BASE, REVISION = "somebody/float-model", "89abcdef0123456789abcdef0123456789abcdef"
LICENCE = {"license": "other", "license_name": "rail", "license_link": "LICENSE.md"}
USERS = "---\nlanguage: en\ntags:\n- cats\nlicense: mit\n---\n\n# My own words\n"


@pytest.fixture(scope="module")
def in_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline where the Hub's cache keeps it, with its card."""
    root = tmp_path_factory.mktemp("cache")
    folder = root / "models--somebody--float-model" / "snapshots" / REVISION
    tiny_pipeline(root / "tokenizer", **SHALLOW).save_pretrained(folder)
    entries = "".join(f"{key}: {value}\n" for key, value in LICENCE.items())
    (folder / "README.md").write_text(f"---\n{entries}pipeline_tag: text-to-image\n---\n\n# The base\n")
    return folder


def quantized(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    plan = mixed_plan(pipe.unet)
    plan.measured = {"held_out_sqnr_db": 38.123, "verified_on": "held-out prompts"}
    return ldmq.quantize(pipe, plan)


@pytest.fixture(scope="module")
def pipe(in_cache: Path) -> Any:
    return quantized(in_cache)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub(monkeypatch, str(tmp_path / "cache")) as hub:
        yield hub


def paths_in(files: dict[str, bytes]) -> list[str]:
    """The files that name a folder of this machine."""
    return [name for name, content in files.items() if not name.endswith(".safetensors") and b"/snapshots/" in content]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def check(card: ModelCard) -> None:
    said = card.data.to_dict()
    assert said["base_model"] == BASE
    assert said["base_model_relation"] == "quantized"
    assert said["library_name"] == "diffusers"
    assert said["pipeline_tag"] == "text-to-image"
    assert {key: said[key] for key in LICENCE} == LICENCE
    assert {"quantization", "ldmq", "int8", "w8a8-dynamic", "stable-diffusion"} <= {*said["tags"]}
    assert "| SQNR" not in card.text.partition("38.12 dB")[2]
    assert "38.12 dB" in card.text


def test_a_saved_pipeline_has_its_card_and_no_path(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "small-model")
    card = ModelCard.load(tmp_path / "small-model" / "README.md")
    check(card)
    assert REVISION in card.text
    assert 'DiffusionPipeline.from_pretrained("small-model", torch_dtype=torch.float32)' in card.text
    assert "\n    vllm serve small-model --omni --dtype float32\n" in card.text
    assert "\n    ldmq serve small-model " in card.text
    saved = contents(tmp_path / "small-model")
    assert not paths_in(saved)
    assert json.loads(saved["unet/config.json"])["_name_or_path"] == BASE
    assert json.loads(saved["model_index.json"])["_name_or_path"] == BASE


def test_the_card_counts_what_the_model_has(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    summary = summarize(pipe.unet)
    for name, share in summary.schemes.items():
        counts = f"{share.convolutions} | {share.linears} | {share.bytes_before:,} | {share.bytes_after:,}"
        assert f"| {name} | {counts} |" in text
    assert f"{summary.bytes_after:,} bytes" in text


def test_an_upload_carries_all_of_it(pipe: Any, hub: Hub, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    ldmq.write_card(pipe, tmp_path / "saved", pictures=b"PNG")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    again.push_to_hub("me/small")
    files = hub.repos["me/small"]
    card = ModelCard(files["README.md"].decode())
    check(card)
    assert '"me/small"' in card.text
    assert f"({PICTURES})" in card.text
    assert files[PICTURES] == b"PNG"
    assert "unet/diffusion_pytorch_model.safetensors" in files
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


def test_saving_with_an_upload_is_the_same(pipe: Any, hub: Hub, tmp_path: Path) -> None:
    pipe.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="me/small")
    check(ModelCard(hub.repos["me/small"]["README.md"].decode()))
    assert contents(tmp_path / "saved") == hub.repos["me/small"]
    assert not paths_in(hub.repos["me/small"])


def test_a_model_alone_is_uploaded_with_a_card(pipe: Any, hub: Hub) -> None:
    pipe.unet.push_to_hub("me/unet")
    card = ModelCard(hub.repos["me/unet"]["README.md"].decode())
    assert 'UNet2DConditionModel.from_pretrained("me/unet"' in card.text
    assert card.data.base_model == BASE
    assert not paths_in(hub.repos["me/unet"])


def test_a_card_on_the_hub_keeps_its_text_and_gets_what_it_lacks(
    pipe: Any, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.repos["me/small"] = {"README.md": USERS.encode()}
    with caplog.at_level(logging.WARNING):
        pipe.push_to_hub("me/small")
    card = ModelCard(hub.repos["me/small"]["README.md"].decode())
    assert card.text.strip() == "# My own words"
    assert card.data.license == "mit"
    assert card.data.base_model == BASE
    assert card.data.tags[:2] == ["cats", "quantization"]
    assert "the card of me/small is yours" in caplog.text


@pytest.mark.parametrize("upload", [False, True])
def test_a_readme_of_the_users_stays(
    pipe: Any, hub: Hub, tmp_path: Path, upload: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_text(USERS)
    pipe.save_pretrained(str(tmp_path), push_to_hub=upload, repo_id="me/small")
    assert "# My own words" in (tmp_path / "README.md").read_text()
    assert "README.md" in caplog.text or "the card of me/small" in caplog.text
    with pytest.raises(FileExistsError, match="somebody else"):
        ldmq.write_card(pipe, tmp_path)


def test_a_readme_that_is_no_text_stays(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe\x00"


def test_the_licence_comes_from_the_hub_where_only_the_name_is_known(in_cache: Path, hub: Hub) -> None:
    pipe = quantized(in_cache)
    pipe.register_to_config(_name_or_path=BASE)
    hub.cards[BASE] = {"license": "openrail++"}
    pipe.push_to_hub("me/small")
    assert ModelCard(hub.repos["me/small"]["README.md"].decode()).data.license == "openrail++"
    del hub.cards[BASE]
    pipe.push_to_hub("me/other")
    assert ModelCard(hub.repos["me/other"]["README.md"].decode()).data.license is None


def test_a_base_that_is_not_known_is_not_made_up(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "tokenizer", **SHALLOW).save_pretrained(tmp_path / "float")
    pipe = quantized(tmp_path / "float")
    pipe.save_pretrained(tmp_path / "small")
    assert ModelCard.load(tmp_path / "small" / "README.md").data.base_model is None
    assert not [name for name, content in contents(tmp_path / "small").items() if str(tmp_path).encode() in content]
    ldmq.write_card(pipe, tmp_path / "small", base_model=BASE)
    assert ModelCard.load(tmp_path / "small" / "README.md").data.base_model == BASE
    with pytest.raises(ValueError, match="no name on the Hub"):
        ldmq.write_card(pipe, tmp_path / "small", base_model="/home/me/model")


def test_a_float_pipeline_is_saved_and_uploaded_as_before(in_cache: Path, hub: Hub, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(in_cache, torch_dtype=torch.float32)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    pipe.unet.push_to_hub("me/float")
    assert "automatically generated" in hub.repos["me/float"]["README.md"].decode()
    with pytest.raises(ValueError, match="nothing of this"):
        ldmq.write_card(pipe, tmp_path)


def test_a_saved_model_alone_names_no_path(pipe: Any, tmp_path: Path) -> None:
    pipe.unet.save_pretrained(tmp_path)
    assert not paths_in(contents(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    UNet2DConditionModel.from_pretrained(tmp_path)
