"""The demo from end to end with untrained weights: what it writes, replaces and leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from ldmq_kernels.demo import models, run, scenes
from ldmq_kernels.demo.evaluator import Evaluator
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.planning.planner import make_plan
from ldmq_kernels.planning.session import PlanResult
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan

CAPTIONS = 5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained parts in the place of the shipped ones."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("demo") / "weights"
    tokenizer = models.build_tokenizer(folder.parent / "tokenizer")
    pipe = diffusers.StableDiffusionPipeline(
        vae=models.build_vae(),
        text_encoder=models.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=models.build_unet(),
        scheduler=models.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.half()
    pipe.save_pretrained(folder)
    (folder / "evaluator").mkdir()
    save_file({k: v.half() for k, v in Evaluator().state_dict().items()}, folder / "evaluator" / "model.safetensors")
    return folder


_planned: list[PlanResult] = []


def _plan_once(*arguments: Any, **options: Any) -> PlanResult:
    """The same weights and prompts give the same plan, in every test."""
    if not _planned:
        _planned.append(make_plan(*arguments, **options))
    return _planned[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sampling step, one format and few prompts."""
    monkeypatch.setattr(run, "STEPS", 1)
    monkeypatch.setattr(run, "CALIBRATION_PROMPTS", 2)
    monkeypatch.setattr(run, "DEFAULT_FORMATS", ("w8a16",))
    monkeypatch.setattr(run, "TARGET_DB", 15.0)
    monkeypatch.setattr(run, "make_plan", _plan_once)


@pytest.mark.slow
def test_the_demo_leaves_a_page_its_numbers_and_a_model_that_loads(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run.run_demo(out, CAPTIONS, weights=weights)
    assert {file.name for file in out.iterdir()} == {
        "pictures.png",
        "report.html",
        "results.json",
        "plan.json",
        "layers.csv",
        "quantized",
    }
    results = json.loads((out / "results.json").read_text())
    assert results["captions"] == CAPTIONS
    assert results["unet_bytes"]["ratio"] < 0.55
    assert results["sqnr"]["held_out_captions_db"] >= 15
    assert set(results["scores"]["accuracy_before"]) == {"one object", "two objects", "all"}
    assert {"one UNet call, batch 2", f"one UNet call, batch {2 * CAPTIONS}"} == {t["what"] for t in results["times"]}
    unet = diffusers.StableDiffusionPipeline.from_pretrained(out / "quantized", torch_dtype=torch.float32).unet
    assert all(isinstance(layer, QuantizedLayer) for layer in quantizable_layers(unet).values())
    Plan.load(out / "plan.json").layers(models.build_unet())

    (tmp_path / "out.new").write_text("mine")  # what stands beside is nobody's but the user's
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        run.run_demo(out, CAPTIONS, weights=weights)
    (out / "notes.txt").unlink()
    (out / "layers.csv").write_text("old")
    run.run_demo(out, CAPTIONS, weights=weights)
    assert (out / "layers.csv").read_text() != "old"
    assert (tmp_path / "out.new").read_text() == "mine"
    (tmp_path / "out.new").unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_no_demo_made_is_left_alone(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"kind": "something else"}')
    with pytest.raises(FileExistsError, match="is not empty"):
        run.run_demo(tmp_path, CAPTIONS, weights=weights)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_ctrl_c_leaves_the_earlier_demo(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ctrl_c(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text(json.dumps({"kind": run.KIND}))
    monkeypatch.setattr(run, "draw_pictures", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        run.run_demo(out, CAPTIONS, weights=weights)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in out.iterdir()] == ["results.json"]


@pytest.mark.slow
def test_a_model_that_draws_otherwise_after_loading_is_an_error(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reload = run._reload

    def reload_another(*arguments: object) -> object:
        pipe = reload(*arguments)
        with torch.no_grad():
            pipe.unet.conv_norm_out.bias.add_(0.1)
        return pipe

    monkeypatch.setattr(run, "_reload", reload_another)
    with pytest.raises(run.ReloadError):
        run.run_demo(tmp_path / "out", 4, weights=weights)
    assert list(tmp_path.iterdir()) == []


def test_scored_captions_were_never_trained_on_and_calibrated_ones_were() -> None:
    scored = run.held_out_captions(41)
    assert len({caption for caption, _ in scored}) > 35
    assert [len(scene.things) for _, scene in scored[:4]] == [1, 2, 1, 2]
    assert all(scenes.is_held_out(caption) for caption, _ in scored)
    calibrated = run.calibration_captions(10)
    assert len(calibrated) == len(set(calibrated)) == 10
    assert not any(scenes.is_held_out(caption) for caption in calibrated)
