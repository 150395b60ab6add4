"""plan, quantize and analyze: what stops them before the work, and how the line says it."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from ldmq_kernels.plans.plan import VERSION
from python_tests.cli.commands import complaint, run, what_is_in

QUICK = ("--steps", "1", "--formats", "w8a16")


def _wrong_models(tmp_path: Path, model: Path) -> dict[str, Path]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["GPT2"]}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "file").write_text("")
    return {
        "there is no model directory": tmp_path / "nowhere",
        "is not a diffusers directory": tmp_path / "empty",
        "has no _class_name": tmp_path / "other",
        "is not a JSON file": tmp_path / "broken",
        "is a file": tmp_path / "file",
    }


def test_a_directory_that_is_no_model_is_named(
    model: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, folder in _wrong_models(tmp_path, model).items():
        assert run("quantize", folder, "--plan", plan_file, "--out", tmp_path / "out") == 1
        line = complaint(capsys)
        assert words in line
        assert str(folder) in line
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_refused(
    model: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("quantize", model, "--plan", plan_file, "--out", tmp_path / "quantized")
    capsys.readouterr()
    assert run("quantize", tmp_path / "quantized", "--plan", plan_file, "--out", tmp_path / "twice") == 1
    assert "quantized already, with ldmq" in complaint(capsys)
    assert not (tmp_path / "twice").exists()


def test_truncated_weights_are_refused(
    model: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "cut")
    weights = next((tmp_path / "cut" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert run("quantize", tmp_path / "cut", "--plan", plan_file, "--out", tmp_path / "out") == 1
    assert "cannot be loaded" in complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_planning_needs_a_pipeline(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", model / "unet", "--prompts", prompts, "--target-sqnr", 30, "--out", tmp_path / "p.json") == 1
    assert "give the whole pipeline" in complaint(capsys)


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xff\xfe\x00"], ids=["empty", "blank", "not text"])
def test_a_prompt_file_without_prompts_is_named(
    content: bytes, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    arguments = ("--prompts", tmp_path / "bad.txt", "--target-sqnr", 30, "--out", tmp_path / "p.json")
    assert run("plan", model, *arguments) == 1
    assert "bad.txt" in complaint(capsys)


def test_a_target_out_of_reach_says_what_can_be(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.json"
    assert run("plan", model, "--prompts", prompts, "--target-sqnr", 150, "--out", out, *QUICK) == 1
    text = capsys.readouterr().err
    assert "at most about" in text
    assert not out.exists()


def _spoil(plan: dict, how: str) -> None:
    if how == "newer":
        plan["ldmq_plan"] = VERSION + 1
    elif how == "another model":
        plan["model"]["fingerprint"] = "0" * 16
    elif how == "unknown layer":
        plan["exceptions"]["no.such.layer"] = {"scheme": "fp16"}
    elif how == "unknown format":
        plan["rules"][0]["scheme"] = "w3a8"
    else:
        plan["input_scales"] = dict.fromkeys(plan["input_scales"], -1.0)


@pytest.mark.parametrize("how", ["newer", "another model", "unknown layer", "unknown format", "nonsense"])
def test_a_plan_that_does_not_fit_is_refused(
    how: str, model: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = json.loads(plan_file.read_text())
    _spoil(plan, how)
    plan_file.write_text(json.dumps(plan))
    assert run("quantize", model, "--plan", plan_file, "--out", tmp_path / "out") == 1
    complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(
    model: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert run("quantize", model, "--plan", plan_file, "--out", tmp_path / "out") == 1
    assert "is not empty" in complaint(capsys)
    assert what_is_in(tmp_path / "out") == {"mine.txt"}


def test_verbose_shows_the_traceback_and_silence_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("plan", tmp_path, "--prompts", tmp_path / "none.txt", "--target-sqnr", 3, "--out", tmp_path / "p")
    run(*arguments)
    assert "Traceback" not in capsys.readouterr().err
    run(*arguments, "--verbose")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "m", "--prompts", "p", "--out", "o"),
        ("plan", "m", "--prompts", "p", "--target-sqnr", "3"),
        ("plan", "m", "--prompts", "p", "--out", "o", "--pareto", "--target-ms", "3"),
        ("quantize", "m", "--out", "o"),
        ("quantize", "m", "--out", "o", "--plan", "p", "--target-sqnr", "3"),
    ],
    ids=["no target", "no place", "pareto and target", "neither plan nor prompts", "both"],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments) == 2


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    script = (
        "import sys\nfrom ldmq_kernels.cli import main\ntry: main(['--help'])\n"
        "except SystemExit: pass\nprint([m for m in ('torch', 'diffusers', 'matplotlib') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.strip().endswith("[]")


def test_unreadable_safetensors_header_is_a_clear_error(
    model: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "bad")
    weights = next((tmp_path / "bad" / "unet").glob("*.safetensors"))
    weights.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    assert run("quantize", tmp_path / "bad", "--plan", plan_file, "--out", tmp_path / "out") == 1
    assert "cannot be loaded" in complaint(capsys)
