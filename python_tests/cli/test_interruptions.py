"""A full disk, Ctrl-C and SIGTERM: what is left of a command's work, and of its handlers."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import diffusers
import pytest

from ldmq_kernels import cli
from python_tests.cli.commands import complaint, run, what_is_in

QUICK = ("--steps", "1", "--formats", "w8a16")


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
    monkeypatch.setattr("os.fsync", _ctrl_c)
    arguments = ("--prompts", prompts, "--target-sqnr", 20, "--out", tmp_path / "analysis")
    assert run("analyze", model, *arguments, *QUICK) != 0
    assert what_is_in(tmp_path) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_being_terminated_while_saving_leaves_nothing_of_a_model(
    number: int, code: int, model: Path, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = what_is_in(tmp_path)
    monkeypatch.setattr(diffusers.AutoencoderKL, "save_pretrained", lambda *_, **__: signal.raise_signal(number))
    ignored = signal.signal(number, signal.SIG_DFL)  # as under nohup
    try:
        assert run("quantize", model, "--plan", plan_file, "--out", tmp_path / "out") == code
    finally:
        signal.signal(number, ignored)
    assert what_is_in(tmp_path) == before


def test_a_hangup_that_is_ignored_as_under_nohup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    went_on = []
    monkeypatch.setattr(cli, "app", lambda *_, **__: (signal.raise_signal(signal.SIGHUP), went_on.append(True)))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        cli.main(["doctor"])
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert went_on


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
