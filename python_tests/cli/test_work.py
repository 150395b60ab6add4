"""--work of plan, quantize and analyze: one analysis for all three, and for no other model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest

from ldmq_kernels.plans.plan import Plan
from ldmq_kernels.sensitivity import analysis
from python_tests.cli.commands import complaint, run, what_is_in
from python_tests.tiny import SHALLOW, tiny_pipeline

QUICK = ("--target-sqnr", 20, "--steps", "1", "--formats", "w8a16")


def no_more(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("this was done already, or must not begin")


def test_plan_quantize_and_analyze_go_on_with_one_analysis(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = ("--prompts", prompts, *QUICK, "--work", tmp_path / "work")
    assert run("plan", model, *wishes, "--out", tmp_path / "made.json") == 0
    monkeypatch.setattr(analysis.LayerSearch, "candidates", no_more)
    monkeypatch.setattr(analysis._TrialModel, "noise_of_each", no_more)
    assert run("quantize", model, *wishes, "--out", tmp_path / "quantized") == 0
    assert run("analyze", model, *wishes, "--out", tmp_path / "analysis") == 0
    assert Plan.load(tmp_path / "analysis/plan.json").to_dict() == Plan.load(tmp_path / "made.json").to_dict()
    assert "model_index.json" in what_is_in(tmp_path / "quantized")


@pytest.mark.parametrize("command", ["plan", "quantize", "analyze"])
def test_work_of_another_model_is_refused_before_the_pictures(
    command: str,
    model: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wishes = ("--prompts", prompts, *QUICK, "--work", tmp_path / "work")
    monkeypatch.setattr("ldmq_kernels.planning.planner.calibrate", no_more)
    assert run(command, model, *wishes, "--out", tmp_path / "out") == 1  # the folder is opened, and no more is done
    assert "must not begin" in complaint(capsys)
    tiny_pipeline(tmp_path / "tokenizer", seed=1, **SHALLOW).save_pretrained(tmp_path / "other")
    assert run(command, tmp_path / "other", *wishes, "--out", tmp_path / "out") == 1
    assert "holds work that was done with another" in complaint(capsys)
    (tmp_path / "work").chmod(0o755)
    assert run(command, model, *wishes, "--out", tmp_path / "out") == 1
    assert "run `chmod 700 " in complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_a_plan_file_needs_no_work(model: Path, plan_file: Path, tmp_path: Path) -> None:
    wishes = ("--plan", plan_file, "--work", tmp_path / "work", "--out", tmp_path / "out")
    assert run("quantize", model, *wishes) == 2
    assert not (tmp_path / "work").exists()
