"""Where results go: tried before the work, said as it is, and another place where the first one turns bad."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldmq_kernels.files import output_folder
from ldmq_kernels.plans.plan import Plan, plan_output
from ldmq_kernels.plans.reading import is_plan_file
from python_tests.cli.commands import complaint, run, what_is_in
from python_tests.processes import ROOT

QUICK = ("--steps", "1", "--formats", "w8a16")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def begins(*_: object) -> None:
        raise AssertionError("the work has begun")

    for name in ("load", "load_pipeline"):
        monkeypatch.setattr(f"ldmq_kernels.cli.method.{name}", begins)


def _arguments(command: str, model: Path, prompts: Path, plan_file: Path) -> tuple[object, ...]:
    of_prompts = (model, "--prompts", prompts, *QUICK)
    return {
        "plan": ("plan", *of_prompts, "--target-sqnr", 20),
        "pareto": ("plan", *of_prompts, "--pareto"),
        "analyze": ("analyze", *of_prompts),
        "quantize": ("quantize", *of_prompts, "--target-sqnr", 20),
        "by plan": ("quantize", model, "--plan", plan_file),
    }[command]


@pytest.mark.parametrize("command", ["plan", "pareto", "analyze", "quantize", "by plan"])
@pytest.mark.usefixtures("no_work")
def test_a_place_that_is_not_free_is_refused_before_the_work(
    command: str, model: Path, prompts: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    for out in (notes, notes / "result", Path("/dev/null"), Path("/proc/ldmq"), tmp_path / ("x" * 300)):
        assert run(*_arguments(command, model, prompts, plan_file), "--out", out) == 1
        assert str(out) in complaint(capsys)
    reserve = plan_output if command == "plan" else output_folder
    with reserve(tmp_path / "taken"):
        assert run(*_arguments(command, model, prompts, plan_file), "--out", tmp_path / "taken") == 1
        assert f"another run is writing to {tmp_path}/taken" in complaint(capsys)
    assert notes.read_text() == "mine"
    assert what_is_in(tmp_path) == {"notes.txt", "prompts.txt", "plan.json"}


@pytest.mark.usefixtures("no_work")
def test_the_python_call_refuses_a_bad_place_before_the_work_too(tmp_path: Path) -> None:
    import ldmq_kernels as ldmq

    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no ldmq plan"):
        ldmq.plan(None, ["a dog"], target_sqnr_db=20, out=tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["quant [w8a8]", "x[/red]", 'it\'s "so"', "größer", "\udcff"], ids=ascii)
def test_names_are_written_and_said_as_they_are(
    name: str, model: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", model / "unet", "--plan", plan_file, "--out", tmp_path / name) == 0
    assert os.fsencode(name).decode("utf-8", "backslashreplace") in capsys.readouterr().out
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= what_is_in(tmp_path / name)


def test_brackets_in_the_name_of_a_model_are_no_markup(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sd [v1] [").mkdir()
    (tmp_path / "sd [v1] [/x]").symlink_to(model)
    arguments = ("--prompts", prompts, "--target-sqnr", 20, "--dry-run")
    assert run("plan", tmp_path / "sd [v1] [/x]", *arguments) == 0
    assert "[v1] [/x]" in " ".join(capsys.readouterr().out.split())


def test_a_locale_of_ascii_alone_is_no_obstacle(tmp_path: Path) -> None:
    out = tmp_path / "größer"
    program = (
        "import sys; from pathlib import Path; from ldmq_kernels.files import output_folder, printable\n"
        "with output_folder(Path(sys.argv[1])) as write: write(lambda folder: (folder / str(folder).encode()[-1:]"
        ".decode()).touch())\n"
        "print(printable(sys.argv[1]).encode())"
    )
    changes = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, out]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | changes, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(what_is_in(out)) == 1
    assert done.stdout.strip() == str(str(out).encode())


def test_a_tilde_is_the_users_home_and_an_unknown_user_is_named(
    model: Path, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("quantize", model / "unet", f"--plan=~/{plan_file.name}", "--out=~/deep/out") == 0
    assert "config.json" in what_is_in(tmp_path / "deep" / "out")
    assert run("quantize", model / "unet", "--plan=~no-such-user/plan.json", "--out", tmp_path / "other") == 2
    assert "~no-such-user" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_plan_replaces_an_older_plan_and_nothing_else(plan_file: Path, tmp_path: Path) -> None:
    plan = Plan.load(plan_file)
    plan.measured = {"again": 1}
    plan.save(plan_file)
    assert Plan.load(plan_file).measured == {"again": 1}
    for content in ("mine", "{}", "[1]", '{"ldmq_plan":'):
        (tmp_path / "other").write_text(content)
        assert not is_plan_file(tmp_path / "other")
        with pytest.raises(FileExistsError, match="is no ldmq plan"):
            plan.save(tmp_path / "other")
        assert (tmp_path / "other").read_text() == content


def test_a_plan_whose_place_turns_bad_is_put_elsewhere_and_the_line_says_where(
    model: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ldmq_kernels.cli import method

    load = method.load_pipeline

    def spoil(*arguments: object) -> object:
        (tmp_path / "made.json").write_text("mine")
        return load(*arguments)

    monkeypatch.setattr(method, "load_pipeline", spoil)
    out = ("--out", tmp_path / "made.json")
    assert run("plan", model, "--prompts", prompts, "--target-sqnr", 20, *out, *QUICK) == 1
    assert f"the result is in {tmp_path}/made-2.json" in capsys.readouterr().err
    assert Plan.load(tmp_path / "made-2.json").measured["held_out_sqnr_db"] >= 20
    assert (tmp_path / "made.json").read_text() == "mine"


def test_a_run_that_was_killed_is_named_by_the_next(model: Path, plan_file: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from ldmq_kernels.files import output_folder\n"
        f"with output_folder(Path(sys.argv[1])): os.kill(os.getpid(), {signal.SIGKILL:d})"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "out"], cwd=ROOT, check=False)
    assert "out.ldmq-part" in what_is_in(tmp_path)
    assert run("quantize", model / "unet", "--plan", plan_file, "--out", tmp_path / "out") == 0
    assert "out.ldmq-part" not in what_is_in(tmp_path)
