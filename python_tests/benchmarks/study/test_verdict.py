"""What pays does so on every model, in the mean and in the worst tenth."""

from __future__ import annotations

from typing import Any

from benchmarks.study import verdict


def _row(model: str, words: str, *decibels: float) -> dict[str, Any]:
    return {"model": model, "words": words, "by_picture": {"psnr": list(decibels)}}


def test_what_pays_gains_enough_on_both_models_and_loses_no_worst_picture() -> None:
    better, worse_worst, little = (40.5, 50.5), (39.0, 55.0), (40.2, 50.2)
    rows = [_row(model, "base", 40.0, 50.0) for model in ("demo", "second")]
    for words, first, second in (
        ("both", better, better),
        ("one alone", better, little),
        ("in the mean", better, worse_worst),
    ):
        rows += [_row("demo", words, *first), _row("second", words, *second)]
    rows.append(_row("demo", "half drawn", *better))
    tried = verdict.by_words(rows, "words")
    found = verdict.paying(tried, tried["base"])
    assert found == ["both"]
    assert verdict.paying(tried, {"demo": tried["base"]["demo"]}) == []
    assert verdict.told(found, "base").endswith("have these: both.")
    assert verdict.told([], "base").endswith("have none of these.")
