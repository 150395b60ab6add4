"""The kernels are compiled for the CPU once for all processes, and again when anything that goes into them changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from python_tests.kernels import kept_builds
from python_tests.kernels.cuda import emulation


def _no_build(_: Path) -> None:
    raise AssertionError("the kernels are compiled again")


def test_another_process_finds_the_build(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "_build", _no_build)
    assert emulation.emulated_binding.__wrapped__().tiles() == emulated.tiles()


def _another_compiler(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "_compiler_version", lambda: "gcc version 99")


def _another_python(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_builds.sys, "version", "99")


def _another_kernel(root: Path, _: pytest.MonkeyPatch) -> None:
    with (root / "csrc/quantize.cu").open("a") as source:
        source.write("\n")


def _another_emulator(root: Path, _: pytest.MonkeyPatch) -> None:
    (root / "emulator/fibers.h").rename(root / "emulator/threads.h")


@pytest.mark.parametrize("change", [_another_compiler, _another_python, _another_kernel, _another_emulator])
def test_a_build_of_anything_else_does_not_serve(
    emulated: ModuleType,
    change: Callable[[Path, pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = emulation._key()
    shutil.copytree(kept_builds.ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(emulation.EMULATOR, tmp_path / "emulator")
    monkeypatch.setattr(kept_builds, "ROOT", tmp_path)
    monkeypatch.setattr(emulation, "EMULATOR", tmp_path / "emulator")
    assert emulation._key() == before
    change(tmp_path, monkeypatch)
    assert emulation._key() != before


def test_a_build_that_fails_leaves_none_behind(
    emulated: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_builds, "BUILDS", tmp_path)
    monkeypatch.setattr(emulation, "_build", _no_build)
    for _ in range(2):
        with pytest.raises(AssertionError, match="compiled again"):
            emulation.emulated_binding.__wrapped__()
    assert not (tmp_path / "emulator" / emulation._key()).exists()


def test_sources_that_change_while_they_are_compiled_are_an_error(
    emulated: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_builds, "BUILDS", tmp_path)
    monkeypatch.setattr(emulation, "_build", lambda _: _another_compiler(tmp_path, monkeypatch))
    with pytest.raises(RuntimeError, match="the sources changed"):
        emulation.emulated_binding.__wrapped__()
