"""What is worth its code: enough gained in the pictures of every model, and nothing lost in the worst of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.subjects import SUBJECTS
from ldmq_kernels.planning.drawn import Spread

ENOUGH_DB = 0.3  # of PSNR in the mean of pictures
Rows = Mapping[str, Mapping[str, Any]]  # by what is tried and by model, rows with the dB of each picture


def by_words(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Rows by what they say of `key`, and by their model."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row[key], {})[row["model"]] = row
    return found


def paying(tried: Rows, base: Mapping[str, Any]) -> list[str]:
    """What has `ENOUGH_DB` more than a base on every model of the study, and no worse worst tenth."""
    return [words for words, drawn in tried.items() if all(_pays(drawn.get(m), base.get(m)) for m in SUBJECTS)]


def _pays(row: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> bool:
    if row is None or base is None:
        return False
    ours, theirs = (Spread.of(one["by_picture"]["psnr"]) for one in (row, base))
    return ours.mean >= theirs.mean + ENOUGH_DB and ours.worst_tenth >= theirs.worst_tenth


def told(found: Sequence[str], than: str) -> str:
    """A sentence on what `paying` found."""
    which = f"these: {'; '.join(found)}" if found else "none of these"
    return f"{ENOUGH_DB:g} dB of PSNR more than {than} on both models, and no less in the worst tenth, have {which}."
