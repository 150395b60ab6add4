"""The table of plans at other settings holds what was measured there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.study import robustness
from ldmq_kernels.calibration import SamplingSettings
from ldmq_kernels.calibration.clipping import LayerClipping
from ldmq_kernels.calibration.schedulers import check_scheduler
from ldmq_kernels.calibration.settings import changed
from ldmq_kernels.demo.models import build_scheduler

CLIPS = LayerClipping("one", "w8a8-static", 0.25, (3.0,), 10.0, 16.0)
FITS = LayerClipping("two", "w8a8-static", 0.0, (0.9,), 40.0, 40.1)


def _row(monkeypatch: pytest.MonkeyPatch, plan: str, setting: str, error: float) -> dict[str, Any]:
    """Two latents of ones, of which the second has an error ten times as large."""
    latents = torch.ones(2, 4, 2, 2)
    wrong = latents + error * torch.tensor([1.0, 10.0]).reshape(2, 1, 1, 1)
    monkeypatch.setattr(robustness, "with_unet", lambda _pipe, _model, run: run())
    monkeypatch.setattr(robustness, "draw_latents", lambda *_: wrong)
    monkeypatch.setattr(robustness, "decode", lambda _pipe, given: given / 10)
    clipping = {plan: [CLIPS, FITS] if plan == robustness.STATIC else []}
    drawn = robustness.Drawn(SamplingSettings(), latents, latents / 10, clipping)
    return robustness.measured(None, None, ["a", "b"], drawn, plan, setting)


def test_rows_hold_each_caption_and_the_table_their_mean_and_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    row = _row(monkeypatch, robustness.STATIC, "4 steps", 0.01)
    assert row["latent_sqnr_db"] == pytest.approx([40, 20], abs=1e-3)
    assert row["psnr_db"] == pytest.approx([60, 40], abs=1e-3)
    assert [found["layer"] for found in row["clipping"]] == ["one"]
    other = _row(monkeypatch, "dynamic", "4 steps", 0.0)
    assert other["psnr_db"] == [robustness.MOST_DB] * 2
    unfinished = _row(monkeypatch, robustness.STATIC, "10 steps", 0.01)
    text = robustness.table({"rows": [row, other, unfinished]})
    assert "| 4 steps | 30.0 / 20.0 | 100.0 / 100.0 |" in text
    assert "| 4 steps | 50.0 / 40.0 | 100.0 / 100.0 |" in text
    assert "| 4 steps | 1 of 2, 6.0 dB |\n" in text + "\n"
    assert "10 steps" not in text


@pytest.mark.parametrize("changes", robustness.SETTINGS.values(), ids=robustness.SETTINGS)
def test_every_setting_is_one_that_the_demo_can_have(changes: dict[str, Any]) -> None:
    (settings,) = changed(SamplingSettings(), [changes])
    check_scheduler(SimpleNamespace(scheduler=build_scheduler()), settings.scheduler)
