"""Every kernel in a process of its own: what hangs, faults or is missing is a row, and the others are proved."""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_run import cases, smoke
from benchmarks.gpu_run.cases import Case
from benchmarks.gpu_run.smoke import Outcome
from benchmarks.harness.clocks import sampled
from ldmq_kernels.kernels import measurements
from ldmq_kernels.kernels.backend import backends
from ldmq_kernels.tuning import tune
from python_tests.benchmarks import faulty_backend

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LDMQ_CACHE", str(tmp_path / "cache"))
    measurements.forget()
    yield
    measurements.forget()


def plain_copy(target: Path) -> Path:
    """The tree as a machine without git has it, with a backend whose kernels do whatever goes wrong."""
    skipped = shutil.ignore_patterns("__pycache__", "*.so", "results", "weights")
    for folder in ("ldmq_kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, target / folder, ignore=skipped)
    faulty_backend.put_into(target / "ldmq_kernels")
    return target


def without_network() -> list[str]:
    """A command before another one that takes its network away, where this machine has one."""
    tried = shutil.which("unshare") and subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False)
    return ["unshare", "-rn"] if tried and tried.returncode == 0 else []


@pytest.mark.slow
def test_each_kernel_of_a_plain_copy_is_a_row_whatever_it_does(tmp_path: Path) -> None:
    copy, rows = plain_copy(tmp_path / "copy"), tmp_path / "rows.jsonl"
    options = ["--backend", "faulty", "--device", "cpu", "--workers", "3", "--limit", "2", "--rows", str(rows)]
    command = [*without_network(), sys.executable, "-m", "benchmarks", "smoke", *options]
    environment = {
        "PATH": os.defpath,
        "HOME": "/nowhere",
        "LDMQ_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout + run.stderr
    entries = [json.loads(line) for line in rows.read_text().splitlines()]
    found = {entry["row"]["name"]: entry["row"]["outcome"] for entry in entries}
    wanted = {f"faulty {op} {dtype}": how for op, (_, how) in faulty_backend.OPS.items() for dtype in cases.DTYPES}
    assert found == wanted
    assert entries[0]["machine"]["commit"] is None
    (file,) = (tmp_path / "cache").glob("*.json")
    wrong = {op for op, (_, how) in faulty_backend.OPS.items() if how in ("hung", "failed", "wrong")}
    assert set(json.loads(file.read_text())["switched_off"]) == wrong


def test_no_case_left_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    left: list[list[Case]] = []
    monkeypatch.setattr(smoke, "in_child", lambda *_, **__: left)
    assert smoke.main(["--tuning"]) == 0  # all was tuned before
    left.append([Case("triton", "linear_w8a8", cases.SHAPE)])
    monkeypatch.setattr(smoke, "outcomes", lambda batches, **_: [Outcome(batches[0][0], "missing", 0, "no GPU")])
    assert smoke.main(["--tuning"]) == 1
    assert "1 missing" in capsys.readouterr().out


def _tile_case(is_default: bool) -> Case:
    tiles = backends()["triton"].tiles
    assert tiles is not None
    keys = ("linear_w8a8 70x40x64", "linear_w8a8 20x20x48")
    tile = tiles.candidates(keys[0], CPU)[0]
    return Case("triton", "linear_w8a8", cases.SHAPE, "fp16", tile, keys, is_default)


@pytest.mark.parametrize("is_default", [True, False])
def test_a_tile_that_hangs_is_never_tuned_and_its_op_is_off_where_it_would_be_taken(is_default: bool) -> None:
    case = _tile_case(is_default)
    others = [Outcome(case, "refused", 0, "no"), Outcome(case, "ok", 0, ""), Outcome(case, "cut short", 9, "")]
    assert smoke.remember(others) == []
    smoke.remember([Outcome(case, "hung", 20, "killed after 20 s")])
    assert (measurements.switched_off("linear_w8a8", "triton", CPU) is not None) == is_default
    content = measurements.read_file(measurements.user_file(CPU))
    assert set(content["refused"]) == set(case.keys)
    (line,) = content["refused"][case.keys[0]]
    assert line[0] == case.written
    assert "killed after 20 s" in line[1]


def test_the_tuner_leaves_out_what_is_refused_and_keeps_what_is_off_switched_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ldmq_kernels.tuning import calls as tuner_calls
    from ldmq_kernels.tuning.shapes import Linear

    monkeypatch.setattr(tuner_calls, "of_models", lambda *_: ([Linear(3, 70, 64, 40)], []))
    monkeypatch.setattr(tuner_calls, "merged_of", lambda *_: [])
    case = _tile_case(is_default=False)
    measurements.refuse(CPU, case.keys[:1], case.written, "hung")
    measurements.switch_off("conv2d_w8a8", "triton", CPU, "wrong")
    path, _ = tune(CPU, names=("linear_w8a8",), timer=lambda _call, _device: 1.0, show=False)
    content = json.loads(path.read_text())
    assert content["tiles"]["linear_w8a8 70x40x64"] != case.written  # it is the first, which wins among equals
    assert set(content["switched_off"]) == {"conv2d_w8a8"}


def test_every_tile_that_the_models_take_is_a_case_and_those_taken_by_default_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton = backends()["triton"]
    monkeypatch.setattr(triton, "serves", lambda _: True)
    found = [case for (case,) in cases.every_case("triton")]
    assert len({case.name for case in found}) == len(found)
    assert {case.op for case in found if case.tile is None} == {op for op in cases.ops.specs() if triton.has(op)}
    tiles = triton.tiles
    assert tiles is not None
    for op in ("linear_w8a8", "conv2d_w8a8"):
        defaults = {tiles.chosen(key, CPU) for key, _ in cases._products(op)}
        assert defaults == {case.tile for case in found if case.op == op and case.tile and case.is_default}
    batches = cases.tuned_cases({"linear_w8a8 2048x10240x1280"})
    assert all(len({case.keys for case in batch}) == 1 for batch in batches)
    counts = collections.Counter(case.op for batch in batches for case in batch)
    assert set(counts) == set(cases.TUNED)
    assert not any("2048x10240x1280" in batch[0].keys[0] for batch in batches)  # tuned before


def test_clock_and_power_are_those_of_the_timed_region() -> None:
    values = iter([(1000.0, 100.0), (1800.0, 650.0), (1700.0, 700.0)])
    reached = torch.zeros(1)

    def read() -> tuple[float, float]:
        reached.add_(1)
        return next(values)  # the end of them ends the thread, and loses none

    with sampled(read) as state:
        assert state == {}
        while reached < 4:
            time.sleep(0.01)
    assert state["clocks_mhz"] == {"median": 1700, "least": 1000, "most": 1800, "samples": 3}
    assert state["power_w"]["most"] == 700
    if not torch.cuda.is_available():
        with sampled() as state:
            pass
        assert state == {}
