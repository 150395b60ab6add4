"""Cases, rows and results files: what is measured, what is kept, and what it says in short."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import cases, machine, results, shapes
from benchmarks.harness.tables import aligned, markdown
from ldmq_kernels.timing import Samples
from ldmq_kernels.tuning.shapes import Conv2d, Linear


def test_a_baseline_that_fails_is_noted_and_ours_has_to_run() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    kept, notes = cases.working({"ldmq": lambda: None, "other": broken})
    assert list(kept) == ["ldmq"]
    assert "no such kernel" in notes["other"]
    with pytest.raises(RuntimeError):
        cases.working({"ldmq": broken})


def test_a_share_of_bandwidth_counts_every_byte_that_has_to_move() -> None:
    case = cases.Case("silu_quantize", {}, 1, ("copy",), dict, moved=3000, input_bytes=2000)
    row = cases.row(case, "reference", {"ldmq": Samples((0.5, 1.0, 1.5)), "copy": Samples((2.0,))}, {})
    assert row["share_of_copy_bandwidth"] == pytest.approx((3000 / 1.0) / (4000 / 2.0))
    assert (row["p20"], row["p80"]) == pytest.approx((0.7, 1.3))
    case = replace(case, work=5.0, input_bytes=0, op="linear_w8a8")
    row = cases.row(case, "reference", {"ldmq": Samples((2.0,)), "other": Samples((3.0,))}, {})
    assert row["tops"] == 2.5
    assert row["gbps"] == pytest.approx(3000 / 2e-3 / 1e9)
    assert row["rivals"]["other"]["ratio"] == 1.5


def test_a_mean_is_weighted_by_how_often_a_model_calls_the_shape() -> None:
    rows = [{"count": count, "rivals": {"fp16": {"ratio": ratio}}} for count, ratio in ((3, 2.0), (1, 32.0))]
    assert cases.geometric_mean(rows, "fp16") == pytest.approx(4.0)
    assert cases.geometric_mean(rows, "fp8") is None


@pytest.mark.parametrize(
    ("notation", "text", "wanted"),
    [
        (shapes.LINEAR, "4096x1280x640", Linear(0, 4096, k=640, n=1280)),
        (shapes.TOKENS, "17X320", Linear(0, 17, 320, 320)),
        (shapes.CONV2D, "2x320x64x64x640", Conv2d(0, 2, 320, 64, 640)),
        (shapes.IMAGE, "2x320x64x64", Conv2d(0, 2, 320, 64, 320)),
    ],
)
def test_a_shape_is_read_as_it_is_written(notation: shapes.Notation, text: str, wanted: Linear | Conv2d) -> None:
    assert notation.parse(text) == wanted


@pytest.mark.parametrize("text", ["4096x1280", "4096x1280x640x3", "4096x-1x640", "4096x0x640", "a x b", ""])
def test_what_is_no_shape_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="MxNxK, positive whole numbers such as 4096x1280x1280"):
        shapes.LINEAR.parse(text)


def test_a_picture_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match="square pictures, as the models have them, and not 64x32"):
        shapes.IMAGE.parse("2x320x64x32")


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        machine.use_device("cuda")


def test_rows_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    results.append(path, "ceilings", {"name": "copy"})
    with path.open("a") as file:
        file.write('{"what": "cei')
    (found,) = results.read(path)
    assert found["what"] == "ceilings"
    assert found["row"] == {"name": "copy"}
    assert {"device", "torch", "commit", "date"} <= set(found["machine"])


def test_rows_become_results_and_the_last_one_of_a_shape_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    path = tmp_path / "rows.jsonl"
    for ms in (4.0, 2.0):
        baselines = {"fp16": {"ms": 6.0, "ratio": 6.0 / ms}}
        shape = {"N": 2, "C": 320, "H": 64, "W": 64, "K": 320, "kernel": 3}
        row = {"op": "conv2d_w8a8", "shape": shape, "count": 7, "ms": ms, "tops": 1.0, "rivals": baselines}
        results.append(path, "conv2d_w8a8", row)
    for forms, best in (({"ldmq_eager": 15.0, "compiled_fp16": 20.0}, 14.0), ({"ldmq_eager": 13.0}, 13.0)):
        results.append(path, "model_sdxl", {"op": "sdxl", "ms": forms, "summary": {"unet_sdxl/ms": best}})
    written = {results.kind_of(p): json.loads(p.read_text()) for p in results.collect(results.read(path))}
    assert set(written) == {"conv2d_w8a8", "model_sdxl"}
    assert [row["ms"] for row in written["conv2d_w8a8"]["rows"]] == [2.0]
    assert written["conv2d_w8a8"]["summary"]["conv2d_w8a8/geomean_vs_cudnn_fp16"] == pytest.approx(3.0)
    assert written["model_sdxl"]["summary"] == {"unet_sdxl/ms": 14.0}


def test_the_newest_file_of_a_kind_and_device_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for device, date in (("h200", "2026-01-02"), ("h200", "2026-02-01"), ("a100", "2026-01-01")):
        results.keep("ceilings", [], {}, {"device": device, "date": date})
    assert {key: path.name[:10] for key, path in results.newest().items()} == {
        ("ceilings", "h200"): "2026-02-01",
        ("ceilings", "a100"): "2026-01-01",
    }


def test_tables_keep_every_cell() -> None:
    header, lines = ["", "ms"], [["ldmq", "1.25"], ["fp16", "12.5"]]
    assert markdown(header, lines) == "|  | ms |\n| --- | --- |\n| ldmq | 1.25 |\n| fp16 | 12.5 |"
    assert aligned(header, lines, left=1) == "        ms\nldmq  1.25\nfp16  12.5"


@pytest.mark.parametrize("option", ["--json", "--rows", "--record"])
def test_results_that_could_not_be_written_are_refused_before_they_are_measured(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").write_text("mine")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "notes")
    parser = argparse.ArgumentParser()
    results.add_options(parser)
    given = parser.parse_args([option] if option == "--record" else [option, str(tmp_path / "notes" / "out")])
    with pytest.raises(OSError, match=r"Not a directory|which is no folder"):
        results.Output.of("linear_w8a8", given)
    with pytest.raises(OSError, match=r"Not a directory|which is no folder"):
        results.check_keep("method")


@pytest.mark.parametrize(
    ("name", "multiprocessors", "tops"),
    [("NVIDIA H200", 132, 1979), ("NVIDIA GeForce RTX 3090", 82, 284), ("NVIDIA GeForce RTX 3090 Ti", 84, None)],
)
def test_the_peak_is_that_of_the_gpu_and_not_of_one_whose_name_is_in_its_own(
    name: str, multiprocessors: int, tops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(machine, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert machine.int8_peak() == tops
