"""The one command for a GPU machine: stages in time, one failure stops no other, a later run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import on_gpu
from benchmarks.__main__ import COMMANDS
from benchmarks.harness.results import OPS
from benchmarks.on_gpu import Stage, run

ADD = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"


@pytest.fixture(autouse=True)
def short_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(on_gpu, "SMALLEST_STAGE", 0.5)
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)


def test_stages_run_in_order_and_a_failed_one_stops_no_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stages = (
        Stage("first", ("-c", ADD, "{rows}", "1"), 60),
        Stage("wrong", ("-c", "import sys; print('what went wrong'); sys.exit(3)"), 60),
        Stage("last", ("-c", ADD, "{rows}", "2"), 60),
    )
    state = run(stages, 120, out)
    assert state == {"first": "passed", "wrong": "failed (3)", "last": "passed"}
    assert (out / "rows.jsonl").read_text() == "12"
    assert "what went wrong" in (out / "log.txt").read_text()
    assert {path.name for path in out.iterdir()} <= set(on_gpu.FILES)


@pytest.mark.slow
def test_a_stage_over_its_limit_is_cut_short_with_its_children_and_none_starts_when_time_is_up(tmp_path: Path) -> None:
    sleep = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}, sys.argv[1]])"
    stages = (Stage("slow", ("-c", parent, "{rows}"), 3.0), Stage("next", ("-c", "import time; time.sleep(600)"), 600))
    assert run((*stages, Stage("last", ("-c", ""), 60)), 6, tmp_path) == {"slow": "cut short", "next": "cut short"}
    process = Path("/proc", (tmp_path / "rows.jsonl").read_text(), "stat")
    assert not process.exists() or process.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_later_run_takes_the_folder_over_and_repeats_only_what_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    passes, fails = Stage("first", ("-c", ADD, "{rows}", "1"), 60), Stage("second", ("-c", "raise SystemExit(1)"), 60)
    run((passes, fails), 120, earlier)
    later = (passes, Stage("second", ("-c", ADD, "{rows}", "3"), 60), Stage("new", ("-c", ADD, "{rows}", "2"), 60))
    monkeypatch.setattr(on_gpu, "STAGES", later)
    monkeypatch.setenv("OUT", str(out))
    assert on_gpu.main(["--seconds", "60", "--resume", str(earlier)]) == 0
    assert (out / "rows.jsonl").read_text() == "123"  # what was never started comes before what failed


def test_tuned_tiles_are_put_where_the_ops_look_for_them(tmp_path: Path) -> None:
    from ldmq_kernels.kernels.gpu import Gpu, file_name

    out = tmp_path / "out"
    out.mkdir()
    (out / "tuned.json").write_text(json.dumps({"gpu": "NVIDIA H200", "tiles": {}}))
    environment = on_gpu._environment(out)
    name = file_name(Gpu("NVIDIA H200", 90, 132))
    assert (Path(environment["LDMQ_CACHE"]) / name).exists()


def test_only_wheels_of_what_is_missing_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "WHEELS", tmp_path)
    for name in ("torch-1.0-py3-none-any.whl", "no_such_package-1.0-py3-none-any.whl", "markdown_it_py-1-py3-none.whl"):
        (tmp_path / name).touch()
    assert on_gpu.missing_wheels() == [str(tmp_path / "no_such_package-1.0-py3-none-any.whl")]


def test_every_stage_names_something_that_is_there() -> None:
    root = Path(on_gpu.__file__).parent.parent
    for stage in on_gpu.STAGES:
        first, *others = stage.command
        if first != "-m":
            assert (root / first).exists(), stage.name
        elif others[0] == "benchmarks":
            assert others[1] in COMMANDS, stage.name
            assert others[1] != "op" or others[2] in OPS
        elif others[0] != "pytest":
            assert (root / Path(*others[0].split(".")) / "__main__.py").exists(), stage.name
        for part in stage.command:
            if part.startswith("python_tests"):
                assert (root / part).exists(), stage.name
    assert len({stage.name for stage in on_gpu.STAGES}) == len(on_gpu.STAGES)
