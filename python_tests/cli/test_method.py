"""plan, quantize and analyze on a small pipeline directory: what they write."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan
from python_tests.cli.commands import complaint, run, what_is_in
from python_tests.tiny import SHALLOW, draw, tiny_unet

QUICK = ("--steps", "1", "--formats", "w8a16")


def test_a_plan_is_written_and_quantizes_the_model(model: Path, prompts: Path, tmp_path: Path) -> None:
    out, quantized = tmp_path / "made.json", tmp_path / "quantized"
    assert run("plan", model, "--prompts", prompts, "--target-sqnr", 20, "--out", out, *QUICK) == 0
    assert Plan.load(out).measured["held_out_sqnr_db"] >= 20
    assert run("quantize", model, "--plan", out, "--out", quantized) == 0
    unet = diffusers.StableDiffusionPipeline.from_pretrained(quantized, torch_dtype=torch.float32).unet
    assert all(isinstance(m, QuantizedLayer) for m in quantizable_layers(unet).values())


def test_quantize_keeps_the_stored_dtype_and_the_pictures(model: Path, plan_file: Path, tmp_path: Path) -> None:
    assert run("quantize", model, "--plan", plan_file, "--out", tmp_path / "quantized") == 0
    load = diffusers.StableDiffusionPipeline.from_pretrained
    pipe = load(model, torch_dtype=torch.float32)
    import ldmq_kernels

    ldmq_kernels.quantize(pipe, plan_file)
    assert torch.equal(draw(load(tmp_path / "quantized", torch_dtype=torch.float32)), draw(pipe))
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "quantized" / "unet", torch_dtype=torch.float16)
    weights = (tmp_path / "quantized" / "unet").glob("*.safetensors")
    assert sum(file.stat().st_size for file in weights) < 2 * sum(p.numel() for p in tiny_unet(**SHALLOW).parameters())
    assert unet.dtype == torch.float16


def test_a_pareto_front_leaves_plans_a_table_and_a_picture(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pareto"
    arguments = ("--steps", "1", "--formats", "w8a8-dynamic,w8a16,fp16")
    assert run("plan", model, "--prompts", prompts, "--pareto", "--out", out, *arguments) == 0
    told = capsys.readouterr().out
    with (out / "pareto.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [f"plan_{number:02}.json" for number in range(1, len(rows) + 1)]
    assert len(rows) > 3
    assert what_is_in(out) == {"pareto.csv", "pareto.svg", *names}
    assert all(name in told for name in names)
    for name, row in zip(names, rows, strict=True):
        plan = Plan.load(out / name)
        assert plan.measured["weight_bytes"] == int(row["weight_bytes"])
        assert plan.measured["held_out_sqnr_db"] == pytest.approx(float(row["measured_db"]), abs=1e-3)
        assert plan.measured["verified_on"] == "held-out prompts"
    assert "<svg" in (out / "pareto.svg").read_text()


@pytest.mark.slow
def test_targets_can_be_combined(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.json"
    limits = ("--target-sqnr", 15, "--target-ms", 1e4, "--target-layers", 33)
    assert run("plan", model, "--prompts", prompts, *limits, "--out", out, "--steps", "1") == 0
    plan = Plan.load(out)
    assert plan.target == {"sqnr_db": 15.0, "milliseconds": 1e4, "layers": 33}
    assert plan.measured["held_out_sqnr_db"] >= 15
    assert plan.measured["milliseconds"] <= 1e4


@pytest.mark.slow
def test_signals_and_sensitive_blocks_can_be_asked_for(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.json"
    wishes = ("--signals", "sqnr,ssim", "--hybrid", 0.3, "--height", 24, "--width", 32)
    assert run("plan", model, "--prompts", prompts, "--target-sqnr", 15, *wishes, "--out", out, "--steps", "1") == 0
    plan = Plan.load(out)
    assert plan.measured["predicted_ssim_loss"] >= 0
    assert 0 < plan.measured["held_out_ssim_loss"] < 0.5
    assert (plan.calibration["height"], plan.calibration["width"]) == (24, 32)
    said = [entry["reason"] for entry in plan.exceptions.values()]
    assert any(reason.startswith("sensitive block") for reason in said)


def test_unknown_signals_are_refused_before_any_work(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--target-sqnr", 15, "--signals", "beauty", "--out", tmp_path / "made.json")
    assert run("plan", model, "--prompts", prompts, *arguments) == 1
    assert "give one of sqnr, latent, psnr" in complaint(capsys)


def test_an_analysis_can_show_a_pareto_front(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    assert run("analyze", model, "--prompts", prompts, "--target-psnr", 20, "--pareto", "--out", out, *QUICK) == 0
    assert "Smaller and larger plans" in (out / "report.html").read_text()
    with (out / "sqnr.csv").open() as file:
        ends = [row for row in csv.DictReader(file) if row["place"] == "image" and row["scheme"] != "plan"]
    assert {row["estimated"] for row in ends} == {"1"}
    assert len({row["name"] for row in ends}) > 20
    assert Plan.load(out / "plan.json").target == {"psnr_db": 20.0}


def test_a_unet_directory_is_enough_for_quantize_by_plan(model: Path, plan_file: Path, tmp_path: Path) -> None:
    assert run("quantize", model / "unet", "--plan", plan_file, "--out", tmp_path / "unet") == 0
    assert "config.json" in what_is_in(tmp_path / "unet")


def test_analyze_leaves_a_page_a_table_and_a_plan(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    assert run("analyze", model, "--prompts", prompts, "--target-sqnr", 20, "--out", out, *QUICK) == 0
    assert what_is_in(out) == {"report.html", "layers.csv", "sqnr.csv", "blocks.csv", "plan.json"}
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "mid_block.attentions.0" in (out / "layers.csv").read_text()
    with (out / "sqnr.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["place"] for row in rows} == {"layer", "unet", "latent", "image"}
    assert {row["part"] for row in rows if row["place"] == "unet"} >= {"pooled", "guided", "conditional"}
    whole = [row for row in rows if row["place"] == "unet" and row["scheme"] == "plan" and row["part"] == "pooled"]
    measured = Plan.load(out / "plan.json").measured["held_out_sqnr_db"]
    assert float(whole[-1]["sqnr_db"]) == pytest.approx(measured, abs=0.01)
    assert "mid_block.attentions.0" in (out / "blocks.csv").read_text()


def test_analyze_of_a_target_out_of_reach_still_shows_the_noise(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    assert run("analyze", model, "--prompts", prompts, "--target-sqnr", 150, "--out", out, *QUICK) == 0
    assert what_is_in(out) == {"report.html", "layers.csv", "sqnr.csv", "blocks.csv"}
    assert "150.0 dB cannot be met" in (out / "report.html").read_text()


def test_dry_runs_count_layers_and_write_nothing(
    model: Path, prompts: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = what_is_in(tmp_path)
    assert run("quantize", model, "--plan", plan_file, "--dry-run") == 0
    told = capsys.readouterr().out
    layers = quantizable_layers(tiny_unet(**SHALLOW)).values()
    convolutions = sum(isinstance(layer, torch.nn.Conv2d) for layer in layers)
    assert f"of {convolutions}" in told
    assert run("plan", model, "--prompts", prompts, "--target-sqnr", 30, "--dry-run") == 0
    told = capsys.readouterr().out
    assert str(convolutions) in told
    assert "w4a16" not in told
    assert run("plan", model, "--prompts", prompts, "--target-bytes", 1000, "--dry-run") == 0
    assert "w4a16" in capsys.readouterr().out
    assert what_is_in(tmp_path) == before


def test_targets_in_decibels_of_two_places_are_refused_before_any_work(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ("--target-sqnr", 30, "--target-psnr", 40)
    assert run("plan", model, "--prompts", prompts, *limits, "--out", tmp_path / "made.json") == 2
    assert "30 dB, 40 dB of PSNR are targets of several places" in " ".join(capsys.readouterr().err.split())


def test_quantize_writes_a_card_with_pictures(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small-model"
    wishes = ("--target-sqnr", 20, "--pictures", 1, "--base-model", "somebody/float-model")
    assert run("quantize", model, "--prompts", prompts, *wishes, "--out", out, *QUICK) == 0
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict()["base_model"] == "somebody/float-model"
    assert 'from_pretrained("small-model", torch_dtype=torch.float16)' in card.text
    assert re.search(r"SQNR of the output \| \d+\.\d\d dB", card.text)
    picture = re.search(r"!\[[^]]*\]\((.*)\)", card.text)
    assert picture is not None
    with Image.open(out / picture[1]) as png:
        assert png.size[0] > png.size[1] // 2
    assert "names no base model" not in capsys.readouterr().out


def test_what_a_card_cannot_say_is_refused_before_the_work(
    model: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("quantize", model, "--plan", plan_file, "--out", tmp_path / "quantized")
    assert run(*arguments, "--base-model", "/home/me/model") == 2
    assert "is no name on the Hub" in capsys.readouterr().err
    assert run(*arguments, "--pictures", 2) == 2
    assert "leave --pictures out" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "quantized").exists()
    assert run(*arguments) == 0
    assert "names no base model: give --base-model" in capsys.readouterr().out
