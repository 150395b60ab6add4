"""Every benchmark runs, at sizes that take no time, and its rows become results and tables."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ceilings, collect, common, host_time, model_gpu, rival_models, rows, shapes, update_readme
from benchmarks.models import TOYS
from ldmq_kernels.ops import SCHEMAS

ROOT = Path(__file__).parents[2]
# kernels that one UNet call compiles on an H100, by model; each takes 0.2 to 0.5 s on a CPU core
MOST_KERNELS = {"unet_sd15": 110, "unet_sdxl": 60}


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = (shapes.Linear(2, 24, 64, 512), shapes.Linear(1, 16, 32, 32))
    convolutions = (
        shapes.Conv2d(2, 1, 32, 6, 32),
        shapes.Conv2d(1, 1, 32, 6, 32, stride=2),
        shapes.Conv2d(1, 1, 32, 6, 32, upsample=2),
    )
    monkeypatch.setattr(shapes, "linears", lambda: linears)
    monkeypatch.setattr(shapes, "convolutions", lambda: convolutions)


def test_every_op_has_a_benchmark() -> None:
    assert {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")} == set(SCHEMAS)


@pytest.mark.parametrize("op", SCHEMAS)
def test_a_benchmark_runs_beside_its_rivals(op: str, small_shapes: None) -> None:
    module = importlib.import_module(f"benchmarks.bench_{op}")
    cases = [case for case in module.cases() if case.shape.get("M", 0) < 1000]
    found = list(common.measure(cases, rounds=1))
    assert found
    for case, row in zip(cases, found, strict=True):
        assert set(row["rivals"]) | set(row.get("notes", {})) >= set(case.rivals)
        assert row["op"] == op
        assert row["ms"] > 0
        assert ("tops" in row) == bool(case.work)
        assert ("share_of_copy_bandwidth" in row) == bool(case.moved)
    if hasattr(module, "summary"):
        json.dumps(module.summary(found))


def test_a_rival_that_fails_is_noted_and_ours_has_to_run() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    kept, notes = common.working({"ldmq": lambda: None, "rival": broken})
    assert list(kept) == ["ldmq"]
    assert "no such kernel" in notes["rival"]
    with pytest.raises(RuntimeError):
        common.working({"ldmq": broken})


def test_a_share_of_bandwidth_counts_every_byte_that_has_to_move() -> None:
    case = common.Case("silu_quantize", {}, 1, ("copy",), dict, moved=3000, input_bytes=2000)
    row = common.row(case, {"ldmq": 1.0, "copy": 2.0}, {})
    assert row["share_of_copy_bandwidth"] == pytest.approx((3000 / 1.0) / (4000 / 2.0))
    row = common.row(replace(case, work=5.0, moved=0, op="linear_w8a8"), {"ldmq": 2.0, "rival": 3.0}, {})
    assert row["tops"] == 2.5
    assert row["rivals"]["rival"]["ratio"] == 1.5


@pytest.mark.parametrize("name", TOYS)
def test_a_model_is_measured(name: str) -> None:
    (row,) = model_gpu.measure(name, TOYS[name], torch.float32, rounds=1)
    assert set(row["ms"]) == {"ldmq_eager", "eager_fp16"}
    assert 0.25 < row["summary"]["weights/w8_share_of_fp16"] < 0.6
    key = name if name == "vae_decoder" else f"unet_{name}"
    assert row["summary"][f"{key}/ms"] == row["ms"]["ldmq_eager"]


@pytest.mark.parametrize("tool", rival_models.TOOLS)
def test_another_tool_quantizes_a_copy(tool: str) -> None:
    pytest.importorskip(tool)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)).to(torch.bfloat16)
    x = torch.randn(40, 64).to(torch.bfloat16)
    with torch.no_grad():
        wanted, out = model(x), rival_models.TOOLS[tool](model)(x)
    assert not torch.equal(out, wanted)
    assert (out - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_ceilings_and_host_time_are_measured() -> None:
    assert {row["name"] for row in ceilings.measure(rounds=1)} == {"256^3", "copy"}
    assert host_time.microseconds("quantize_static") > 0


def test_rows_become_results_and_the_last_one_of_a_shape_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    path = tmp_path / "rows.jsonl"
    for ms in (4.0, 2.0):
        rival = {"cudnn_fp16": {"ms": 6.0, "ratio": 6.0 / ms}}
        shape = {"N": 2, "C": 320, "H": 64, "W": 64, "K": 320, "kernel": 3}
        row = {"op": "conv2d_w8a8", "shape": shape, "count": 7, "ms": ms, "tops": 1.0, "rivals": rival}
        rows.append(path, "conv2d_w8a8", row)
    for forms, best in (({"ldmq_eager": 15.0, "compiled_fp16": 20.0}, 14.0), ({"ldmq_eager": 13.0}, 13.0)):
        rows.append(path, "model_sdxl", {"op": "sdxl", "ms": forms, "summary": {"unet_sdxl/ms": best}})
    written = {p.stem.split("-", 3)[-1]: json.loads(p.read_text()) for p in collect.collect(rows.read(path))}
    assert set(written) == {"conv2d_w8a8", "model_sdxl"}
    assert [row["ms"] for row in written["conv2d_w8a8"]["rows"]] == [2.0]
    assert written["conv2d_w8a8"]["summary"]["conv2d_w8a8/geomean_vs_cudnn_fp16"] == pytest.approx(3.0)
    assert written["model_sdxl"]["summary"] == {"unet_sdxl/ms": 14.0}


def test_every_results_file_that_is_there_becomes_a_table() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*/*.json"):
        what = update_readme.kind_of(path)
        text = update_readme.KINDS[what](json.loads(path.read_text()))
        assert "| --- |" in text, path


@pytest.mark.slow
def test_a_cold_start_compiles_few_kernels() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compilations"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 4
    for row in found:
        assert 20 < row["kernels"] <= MOST_KERNELS[row["op"]]
        assert row["launches"] < 2000
