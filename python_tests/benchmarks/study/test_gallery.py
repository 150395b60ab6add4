"""The gallery: what its pictures show is measured, and they are the pages'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.harness import results
from benchmarks.study import gallery


def test_noise_turns_from_one_draw_to_another_and_keeps_its_variance() -> None:
    noise = gallery.turned_noise(0, frames=5, size=64)
    assert noise.shape == (1, 4, 5, 64, 64)
    frames = noise[0].movedim(1, 0).flatten(1)
    assert torch.allclose(frames.std(1), torch.ones(5), atol=0.02)
    likeness = [float(torch.corrcoef(torch.stack([frames[0], frame]))[0, 1]) for frame in frames]
    assert likeness == pytest.approx([1.0, 0.924, 0.707, 0.383, 0.0], abs=0.02)


def test_the_video_unet_has_the_trained_layers_between_temporal_ones() -> None:
    pipe = gallery.video_pipeline()
    trained = gallery.demo.load_demo_pipeline(torch.float32).unet.state_dict()
    state = pipe.unet.state_dict()
    assert type(pipe.unet).__name__ == "UNetMotionModel"
    assert all(torch.equal(state[name], value) for name, value in trained.items())
    temporal = {name for name in state if name not in trained}
    assert all("motion_modules" in name for name in temporal)
    assert any(bool(state[name].any()) for name in temporal if name.endswith("proj_out.weight"))


@pytest.mark.slow
def test_a_subject_is_planned_drawn_and_told(
    shallow_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "TARGET_DB", 15.0)

    def build(steps: int) -> Any:
        calls = [
            {"prompt": text, "num_inference_steps": steps, "height": 16, "width": 16} for text in ("a cat", "a dog")
        ]
        return shallow_pipe, calls, calls[:1], ["a cat"]

    float_unet = shallow_pipe.unet
    shallow_pipe.unet = type(float_unet).from_config(float_unet.config).eval()
    shallow_pipe.unet.load_state_dict(float_unet.state_dict())
    try:
        row = gallery.measured(gallery.Subject("small", "a small one", build), tmp_path, 1, ("w8a8-dynamic",))
    finally:
        shallow_pipe.unet = float_unet
    assert row["convolutions"][0] == row["convolutions"][1] > 0
    assert row["linears"][0] == row["linears"][1] > 0
    assert row["held_out_db"] >= 15
    assert 10 < row["psnr_db"][0] < 90
    assert Image.open(tmp_path / gallery.picture_of("small")).height > 3 * 160
    words = gallery.figures({"rows": [row]})
    assert f"PSNR {row['psnr_db'][0]:.1f} to {row['psnr_db'][0]:.1f} dB" in words
    assert row["model"] in gallery.table({"rows": [row]})


def test_the_pictures_of_the_page_are_there_and_small() -> None:
    pictures = [gallery.DOCS / gallery.picture_of(subject.name) for subject in gallery.SUBJECTS]
    assert sum(path.stat().st_size for path in pictures) < 400_000  # bytes, of both
    assert any(what == gallery.WHAT for what, _ in results.newest())
