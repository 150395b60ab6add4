"""The one command for a GPU machine: stages in time, one failure stops no other, a later run goes on."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import on_gpu, rows
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


def test_a_stage_over_its_limit_is_cut_short_with_its_children(tmp_path: Path) -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {'import time; time.sleep(60)'!r}])"
    begin = time.monotonic()
    state = run((Stage("slow", ("-c", child), 1.0), Stage("next", ("-c", ""), 60)), 120, tmp_path / "out")
    assert state == {"slow": "cut short", "next": "passed"}
    assert time.monotonic() - begin < 30


def test_no_stage_starts_when_time_is_up(tmp_path: Path) -> None:
    state = run((Stage("slow", ("-c", "import time; time.sleep(60)"), 60), Stage("next", ("-c", ""), 60)), 2, tmp_path)
    assert state == {"slow": "cut short"}


def test_a_later_run_repeats_only_what_has_not_passed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stages = (Stage("first", ("-c", ADD, "{rows}", "1"), 60), Stage("second", ("-c", "raise SystemExit(1)"), 60))
    run(stages, 120, out)
    later = (stages[0], Stage("second", ("-c", ADD, "{rows}", "2"), 60))
    assert run(later, 120, out) == {"first": "passed", "second": "passed"}
    assert (out / "rows.jsonl").read_text() == "12"


def test_what_was_never_started_comes_before_what_was_cut_short(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run((Stage("first", ("-c", "import time; time.sleep(60)"), 1.0),), 120, out)
    again = Stage("first", ("-c", ADD, "{rows}", "1"), 60), Stage("second", ("-c", ADD, "{rows}", "2"), 60)
    run(again, 120, out)
    assert (out / "rows.jsonl").read_text() == "21"


def test_an_earlier_runs_folder_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    monkeypatch.setattr(on_gpu, "STAGES", (Stage("first", ("-c", ADD, "{rows}", "1"), 60),))
    run(on_gpu.STAGES, 60, earlier)
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--seconds", "60", "--resume", str(earlier)])
    assert on_gpu.main() == 0
    assert (out / "rows.jsonl").read_text() == "1"


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
        if stage.command[0] != "-m":
            assert (root / stage.command[0]).exists(), stage.name
        elif stage.command[1] != "pytest":
            module = root / Path(*stage.command[1].split("."))
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), stage.name
        for part in stage.command:
            if part.startswith("python_tests"):
                assert (root / part).exists(), stage.name
    assert len({stage.name for stage in on_gpu.STAGES}) == len(on_gpu.STAGES)


def test_rows_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows.append(path, "ceilings", {"name": "copy"})
    with path.open("a") as file:
        file.write('{"what": "cei')
    (found,) = rows.read(path)
    assert found["what"] == "ceilings"
    assert found["row"] == {"name": "copy"}
    assert {"device", "torch", "commit", "date"} <= set(found["machine"])
