"""`ldmq check` names the layers whose ranges clip at other settings, and writes a plan whose ranges do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.plan import LayerPlan, Plan, model_record
from python_tests.cli.commands import complaint, run
from python_tests.tiny import SHALLOW, tiny_unet

NARROW, WIDE = "conv_in", "conv_out"


@pytest.fixture
def narrow_plan(tmp_path: Path) -> Path:
    plan = Plan(model_record(tiny_unet(**SHALLOW)), [])
    plan.set(NARROW, LayerPlan(SCHEMES["w8a8-static"], "", 0.005))
    plan.set(WIDE, LayerPlan(SCHEMES["w8a8-static"], "", 0.1))
    plan.save(tmp_path / "narrow.json")
    return tmp_path / "narrow.json"


@pytest.mark.slow
def test_layers_that_clip_are_named_and_measure_their_scales(
    model: Path, prompts: Path, narrow_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, mended = tmp_path / "settings.jsonl", tmp_path / "mended.json"
    settings.write_text('{"num_inference_steps": 1}\n{"scheduler": "EulerAncestralDiscreteScheduler"}\n')
    asked = ("check", model, "--plan", narrow_plan, "--prompts", prompts, "--steps", 2, "--settings", settings)
    assert run(*asked, "--out", mended) == 0
    told = capsys.readouterr().out
    assert "1 of 2 layers with calibrated ranges clip" in told
    assert NARROW in told
    assert WIDE not in told
    measured = Plan.load(mended).measured["by_settings"]
    assert [entry["num_inference_steps"] for entry in measured] == [1, 2]
    for entry in measured:
        assert f"without clipping {entry['sqnr_db']:.2f} dB" in told
        assert entry["sqnr_db"] > 20
    assert run("check", model, "--plan", mended, *asked[4:]) == 0
    assert "0 of 1 layers with calibrated ranges clip" in capsys.readouterr().out


def test_without_prompts_nothing_is_checked(model: Path, narrow_plan: Path) -> None:
    assert run("check", model, "--plan", narrow_plan) == 2


def test_a_plan_that_is_not_there_is_named(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", model, "--plan", tmp_path / "none.json", "--prompts", prompts) == 1
    assert "there is no plan file" in complaint(capsys)


@pytest.mark.parametrize("command", ["plan", "quantize", "analyze", "check"])
def test_settings_that_are_none_are_refused_before_the_model_is_loaded(
    command: str, model: Path, prompts: Path, narrow_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "settings.jsonl"
    settings.write_text('{"num_inference_steps": 4}\n{"steps": 4}\n')
    asked = {
        "plan": ("--target-sqnr", 30),
        "quantize": ("--target-sqnr", 30),
        "analyze": (),
        "check": ("--plan", narrow_plan),
    }[command]
    asked = (command, model, "--prompts", prompts, "--settings", settings, "--out", tmp_path / "out", *asked)
    assert run(*asked) == 1
    assert "settings[1] has 'steps': it is a mapping with any of num_inference_steps, " in complaint(capsys)
    assert not (tmp_path / "out").exists()
