"""plan, quantize and analyze on a small pipeline directory: what they write, and what stops them."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch

from ldmq_kernels import cli
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import VERSION, Plan
from python_tests.tiny import PROMPTS, SHALLOW, draw, mixed_plan, tiny_pipeline, tiny_unet

QUICK = ("--steps", "1", "--formats", "w8a16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory, stored in float16."""
    root = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline(root / "tokenizer", **SHALLOW)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(torch.float16)
    pipe.save_pretrained(root / "tiny")
    return root / "tiny"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n\n")
    return file


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    mixed_plan(tiny_unet(**SHALLOW)).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    """No command leaves its handler in the process that calls it, however the command ends."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    after = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert after is before


def run(*arguments: object) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """What the last command wrote to standard error: one line."""
    text = capsys.readouterr().err.strip()
    assert text.startswith("ldmq: ")
    assert len(text.splitlines()) == 1
    return text


def what_is_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


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


def test_targets_can_be_combined(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.json"
    limits = ("--target-sqnr", 15, "--target-ms", 1e4, "--target-layers", 33)
    assert run("plan", model, "--prompts", prompts, *limits, "--out", out, "--steps", "1") == 0
    plan = Plan.load(out)
    assert plan.target == {"sqnr_db": 15.0, "milliseconds": 1e4, "layers": 33}
    assert plan.measured["held_out_sqnr_db"] >= 15
    assert plan.measured["milliseconds"] <= 1e4


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
    assert "give sqnr, or sqnr,ssim" in complaint(capsys)


def test_an_analysis_can_show_a_pareto_front(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    assert run("analyze", model, "--prompts", prompts, "--target-sqnr", 20, "--pareto", "--out", out, *QUICK) == 0
    assert "Smaller and larger plans" in (out / "report.html").read_text()


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
    assert str(convolutions) in capsys.readouterr().out
    assert what_is_in(tmp_path) == before


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


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _ctrl_c(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_leaves_nothing_of_a_model(
    model: Path, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = what_is_in(tmp_path)
    monkeypatch.setattr(diffusers.AutoencoderKL, "save_pretrained", _full_disk)  # the UNet is written by then
    assert run("quantize", model, "--plan", plan_file, "--out", tmp_path / "out") == 1
    assert "the disk is full, nothing was written" in complaint(capsys)
    assert what_is_in(tmp_path) == before


def test_ctrl_c_while_saving_leaves_nothing_of_a_model(
    model: Path, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = what_is_in(tmp_path)
    monkeypatch.setattr(diffusers.AutoencoderKL, "save_pretrained", _ctrl_c)
    assert run("quantize", model, "--plan", plan_file, "--out", tmp_path / "out") != 0
    assert what_is_in(tmp_path) == before


def test_ctrl_c_while_the_analysis_is_written_leaves_nothing(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = what_is_in(tmp_path)
    monkeypatch.setattr("ldmq_kernels.files.os.fsync", _ctrl_c)
    arguments = ("--prompts", prompts, "--target-sqnr", 20, "--out", tmp_path / "analysis")
    assert run("analyze", model, *arguments, *QUICK) != 0
    assert what_is_in(tmp_path) == before


def test_being_terminated_while_saving_leaves_nothing_of_a_model(
    model: Path, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = what_is_in(tmp_path)
    monkeypatch.setattr(
        diffusers.AutoencoderKL, "save_pretrained", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
    )
    assert run("quantize", model, "--plan", plan_file, "--out", tmp_path / "out") == 143
    assert what_is_in(tmp_path) == before


@pytest.mark.parametrize(
    "ending", [SystemExit(3), KeyboardInterrupt(), RuntimeError("no")], ids=["exit", "ctrl-c", "error"]
)
def test_the_handler_of_sigterm_is_the_callers_again_however_a_command_ends(
    ending: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = []

    def end(*_: object, **__: object) -> None:
        inside.append(signal.getsignal(signal.SIGTERM))
        raise ending

    monkeypatch.setattr(cli, "app", end)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            cli.main(["doctor"])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [handler is signal.SIG_IGN for handler in inside] == [False]


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
