"""Pictures are compared at equal seeds, times are taken in turns, and the model stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldmq_kernels.calibration.drawings import PROMPTS_AT_ONCE
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import UNetCall
from ldmq_kernels.report.measure import PicturePairs, draw_pictures, time_plan
from python_tests.tiny import mixed_plan, run_unet, tiny_pipeline, tiny_unet, unet_inputs


def test_psnr_of_a_known_error() -> None:
    before = torch.full((2, 3, 4, 4), 0.5)
    after = before.clone()
    after[1] += 0.01
    pairs = PicturePairs(["a", "b"], [0, 1], before, after)
    assert pairs.psnr_db == pytest.approx([100.0, 40.0], abs=1e-4)
    assert pairs.pooled_psnr_db == pytest.approx(40.0 + 3.0103, abs=1e-3)


def test_a_picture_depends_on_its_prompt_and_seed_and_not_on_its_neighbours(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    prompts = [f"a {letter}" for letter in "abcdefghijk"[: PROMPTS_AT_ONCE + 1]]
    together = draw_pictures(pipe, prompts, SamplingSettings(1, 4.0, 50), "pictures")
    alone = draw_pictures(pipe, prompts[-1:], SamplingSettings(1, 4.0, 50 + PROMPTS_AT_ONCE), "picture")
    torch.testing.assert_close(together[-1:], alone, atol=1e-4, rtol=0)
    assert float(together.min()) >= 0
    assert float(together.max()) <= 1


def test_timing_a_plan_leaves_the_model_as_it_was() -> None:
    unet = tiny_unet()
    before = run_unet(unet)
    call = UNetCall(0, (), unet_inputs(), before)
    timing = time_plan(unet, mixed_plan(unet), call, rounds=1)
    assert torch.equal(run_unet(unet), before)
    assert timing.before > 0
    assert timing.speedup == pytest.approx(timing.before / timing.after)
