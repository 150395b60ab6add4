"""The study's first table: rows of both models, by tool, with the worst tenth of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import results
from benchmarks.study import pictures, report


def _row(model: str, tool: str, decibels: list[float]) -> dict[str, Any]:
    counts = {"stored": 1, "computed": 1, "all": 2}
    return {
        "model": model,
        "tool": tool,
        "version": "1",
        "configuration": "some",
        "note": "",
        "captions": len(decibels),
        "steps": 20,
        "convolutions": counts,
        "linears": counts,
        "share_of_fp16": 0.5,
        "by_picture": {"psnr": decibels, "latent": decibels},
        "ms": {"float": 20.0, "float, compiled": 16.0, "own": 12.0, "own, compiled": 8.0},
        "commit": "c" * 40,
    }


def _data(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"rows": list(rows), "device": "a device", "torch": "2", "threads": 2}


def test_pictures_count_by_their_own_decibels_and_the_worst_tenth_is_told() -> None:
    (line,) = [
        text for text in pictures.table(_data(_row("demo", "sdnq", [40.0, 50.0, 60.0]))).splitlines() if "sdnq" in text
    ]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "demo",
        "sdnq 1: some",
        "0.500x",
        "8.0",
        "0.40x / 0.50x",
        "1 / 1 / 2",
        "1 / 1 / 2",
        "3",
        "50.00",
        "42.00",
        "50.00",
        "c" * 10,
    ]


def test_rows_stand_by_model_with_this_package_last() -> None:
    rows = [_row("second", "sdnq", [1.0]), _row("demo", pictures.OURS, [1.0]), _row("demo", "sdnq", [1.0])]
    lines = pictures.table(_data(*rows)).splitlines()[-3:]
    assert [line.split("|")[1:3] for line in lines] == [
        [" demo ", " sdnq 1: some "],
        [" demo ", f" {pictures.OURS} 1: some "],
        [" second ", " sdnq 1: some "],
    ]


def test_the_readme_has_the_rows_of_equal_layers() -> None:
    rows = [_row("demo", "sdnq", [1.0]), _row("demo", pictures.OURS, [2.0, 4.0]), _row("demo", "torchao", [3.0])]
    rows[0]["configuration"], rows[1]["configuration"] = pictures.RIVAL, f"rotated, {pictures.ON_THEM}"
    (rival, ours) = pictures.readme_lines(_data(*rows))
    assert rival[0] == f"demo model, W8A8: sdnq 1: {pictures.RIVAL}"
    assert (
        ours[2] == "3.00 dB in the mean of 2, 2.20 dB for the worst tenth; 0.40x / 0.50x of float32's time for one, "
        "eager / compiled"
    )


def test_rows_of_other_captions_do_not_stand_for_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_arguments: Any) -> dict[str, Any]:
        raise RuntimeError("it is measured")

    monkeypatch.setattr(pictures, "todo", lambda _comparison: [(pictures.OURS, "some", None)])
    monkeypatch.setattr(pictures.Comparison, "row", measure)
    rows, found = tmp_path / "rows.jsonl", [_row("demo", pictures.OURS, db) for db in ([1.0], [1.0, 2.0])]
    rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    for captions in (1, 2):
        pictures.measured(pictures.SUBJECTS["demo"], captions, rows, "")
    with pytest.raises(RuntimeError, match="it is measured"):
        pictures.measured(pictures.SUBJECTS["demo"], 3, rows, "")


def test_the_page_begins_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = tmp_path / "drawn.json"
    drawn.write_text(json.dumps(_data(_row("demo", "sdnq", [40.0]))))
    page = report.write([], tmp_path, {"pictures": drawn, "remedies": None})
    assert page.read_text().startswith("# The study of the method")
    assert "sdnq 1: some" in page.read_text()
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m benchmarks study"):
        report.write_newest(tmp_path)
