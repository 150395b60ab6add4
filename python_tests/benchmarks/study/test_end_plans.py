"""The table of plans at equal bytes says how much room these leave."""

from __future__ import annotations

from typing import Any

from benchmarks.study import end_plans


def _row(case: str, keeps: str, drawn: float, summed: float) -> dict[str, Any]:
    spread, alike = ({"mean": db, "median": db, "worst_tenth": db, "within": 1.25} for db in (drawn, drawn + 1))
    measured = {f"predicted_{keeps}_db": 41.0, f"held_out_{keeps}_db": 42.0}
    if keeps != "sqnr":
        measured[f"predicted_{keeps}_db_within"] = 1.5
    row = {"model": "demo", "case": case, "keeps": keeps, "share_of_fp16": 0.5, "measured": measured, "alike": 0.25}
    row |= {"prompts": 12, "captions": 34, "drawn_alike": {"psnr": alike, "latent": alike}}
    return row | {"drawn": {"psnr": spread, "latent": spread}, "sum_db": {"psnr": summed}}


def test_each_case_tells_its_gain_as_drawn_and_as_the_layers_noise_adds_up() -> None:
    first, second = end_plans.CASES
    rows = [_row(case, keeps, 40.0, 50.0) for case in (first, second) for keeps in ("sqnr", "latent")]
    rows += [_row(first, "psnr", 43.25, 52.0), _row(second, "psnr", 39.5, 50.3)]
    page = end_plans.table({"rows": rows})
    assert f"{first}: keeping the pictures in place of the UNet's output gains +3.2 dB of PSNR drawn, +2.0 dB" in page
    assert "gains -0.5 dB of PSNR drawn, +0.3 dB by the sum" in page
    line = page.splitlines()[-1]
    assert line.startswith(f"| {second} | 0.500x | PSNR of the pictures | 39.5 / 39.5 / 39.5 |")
    assert line.endswith("| 41.0 ± 1.5 / 42.0 / 40.5 ± 1.2 / 39.5 ± 1.2 | 50.3 | 25% |")
    assert "plans from 12 captions; 34 held-out captions" in page
