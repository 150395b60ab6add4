"""What a quantized UNet is measured on: held-out captions, their float trajectory, latents and pictures.

Each caption is drawn once in every seed set. Everything is kept by caption and seed set until the end, so that a
confidence interval can resample captions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness.machine import device
from benchmarks.study.inspect_model import checkpoint_bytes, ssim
from benchmarks.study.samples import Samples
from benchmarks.study.subjects import Subject
from ldmq_kernels import demo
from ldmq_kernels.calibration.calibrate import Calibration, calibrate
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.drawings import LATENT, PROMPTS_AT_ONCE, draw
from ldmq_kernels.calibration.settings import SamplingSettings, Settings
from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall, record_trajectory
from ldmq_kernels.demo import scenes
from ldmq_kernels.demo.evaluator import Evaluator, attributes_right
from ldmq_kernels.demo.run import CALIBRATION_PROMPTS, calibration_captions, held_out_captions
from ldmq_kernels.planning.planner import HELD_OUT_SEED
from ldmq_kernels.planning.request import split_calls
from ldmq_kernels.sensitivity.output_noise import StepNoise, output_noise

TEST_SEED = 2_000_003  # of pictures, far from those of calibration and of the planner's check
NEXT_SEED_SET = 1_000_000
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Setup:
    """The float pipeline and what was recorded of it, on captions that no result is measured on."""

    pipe: Any
    calibration: Calibration
    held_out: Trajectory

    @property
    def unet(self) -> nn.Module:
        """The float UNet."""
        return denoiser(self.pipe)


def with_unet(pipe: Any, model: nn.Module, run: Callable[[], T]) -> T:
    """Run something with another UNet or transformer in a pipeline, which gets its own back afterwards."""
    original = denoiser(pipe)
    name = next(name for name, part in pipe.components.items() if part is original)
    setattr(pipe, name, model)
    try:
        return run()
    finally:
        setattr(pipe, name, original)


@dataclass(frozen=True)
class SeedSet:
    """One seed set: how its pictures are drawn, and what the float pipeline gives."""

    settings: SamplingSettings
    trajectory: Trajectory
    pictures: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What every quantization is measured on; without an evaluator no attributes and no features are.

    Attributes:
        enlarged: pixels a side of a picture for one of those that the evaluator reads.
    """

    pipe: Any
    original: nn.Module
    captions: list[tuple[str, scenes.Scene]]
    seed_sets: list[SeedSet]
    evaluator: Evaluator | None
    enlarged: int = 1

    @cached_property
    def fp16_bytes(self) -> int:
        """Bytes of the float UNet's checkpoint in 16 bits."""
        return checkpoint_bytes(self.original, self.original)

    @property
    def call(self) -> UNetCall:
        """One recorded call of the float UNet."""
        return self.seed_sets[0].trajectory.calls[0]

    @property
    def float_figures(self) -> dict[str, float]:
        """Figures of the float pictures: attributes that the evaluator finds, the summed variance of its features.

        Empty without an evaluator.
        """
        if self.evaluator is None:
            return {}
        read = [self._read(seed_set.pictures) for seed_set in self.seed_sets]
        right, present = (sum(int(part[name].sum()) for part in read) for name in ("right", "present"))
        features = np.concatenate([part["features"] for part in read])
        return {"attribute_accuracy": right / present, "feature_variance": float(features.var(0, ddof=1).sum())}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Samples:
        """Measure a UNet in every seed set.

        Raises:
            ValueError: its output is not finite.
        """
        return Samples.stack([self._evaluate_set(model, seed_set) for seed_set in self.seed_sets])

    def _evaluate_set(self, model: nn.Module, seed_set: SeedSet) -> dict[str, np.ndarray]:
        noise = output_noise(model, seed_set.trajectory, by_sample=True)
        latents = with_unet(self.pipe, model, lambda: draw_latents(self.pipe, self._texts, seed_set.settings))
        exact = seed_set.trajectory.latents.double().cpu()
        error = latents.double().cpu() - exact
        pictures = decode(self.pipe, latents)
        found = {
            "latent_signal": exact.square().flatten(1).sum(1).numpy(),
            "latent_noise": error.square().flatten(1).sum(1).numpy(),
            "squared_error": (pictures.double() - seed_set.pictures.double()).square().flatten(1).mean(1).numpy(),
            "ssim": ssim(seed_set.pictures, pictures).numpy(),
        }
        found["output_signal"], found["output_noise"] = self._by_prompt_and_step(noise)
        if self.evaluator is not None:
            found |= self._read(pictures)
            found["float_features"] = self._read(seed_set.pictures)["features"]
        return found

    @torch.no_grad()
    def _read(self, pictures: Tensor) -> dict[str, np.ndarray]:
        assert self.evaluator is not None
        read = nn.functional.avg_pool2d(pictures, self.enlarged)
        features = torch.cat([self.evaluator.features(part * 2 - 1) for part in read.split(64)])
        right, present = attributes_right(self.evaluator.heads(features), [scene for _, scene in self.captions])
        return {"right": right.numpy(), "present": present.numpy(), "features": features.double().numpy()}

    @property
    def _texts(self) -> list[str]:
        return [text for text, _ in self.captions]

    def _by_prompt_and_step(self, noise: StepNoise) -> tuple[np.ndarray, np.ndarray]:
        """(captions, steps) sums of squares at the UNet's output, guidance's halves pooled."""
        signal, error = (np.zeros((len(self.captions), len(noise.by_step))) for _ in range(2))
        for sample in noise.samples:
            if sample.part != "guided":
                signal[sample.prompt, sample.step] += sample.signal
                error[sample.prompt, sample.step] += sample.noise
        return signal, error


def draw_latents(pipe: Any, prompts: Sequence[str], settings: Settings) -> Tensor:
    """(N, 4, h, w) denoised latents; seeds count up from `settings.seed`."""
    return torch.cat(draw(pipe, prompts, settings, LATENT))


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """(N, 3, H, W) float32 pictures in [0, 1] on the CPU."""
    scaled = latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0)
    decoded = [
        pipe.image_processor.postprocess(pipe.vae.decode(part, return_dict=False)[0], output_type="pt")
        for part in scaled.split(PROMPTS_AT_ONCE)
    ]
    return torch.cat(decoded).float().cpu()


def prepare(
    subject: Subject, *, captions: int, seed_sets: int, steps: int, show: bool = False
) -> tuple[Setup, Evaluation]:
    """Load a model's pipeline, calibrate it, and record what the quantizations are measured against.

    Args:
        captions: held out; eights keep the batches equal.
    """
    dtype = torch.float16 if device().type == "cuda" else torch.float32
    pipe = subject.load(dtype).to(device())
    sampling = SamplingSettings(steps, subject.guidance_scale, 0)
    calibrated_on, verified_on = split_calls(calibration_captions(CALIBRATION_PROMPTS))
    calibration = calibrate(pipe, calibrated_on, sampling, show=show)
    check = record_trajectory(pipe, verified_on, replace(sampling, seed=HELD_OUT_SEED), show=show)
    pairs = held_out_captions(captions)
    sets = []
    for index in range(seed_sets):
        settings = replace(sampling, seed=TEST_SEED + index * NEXT_SEED_SET)
        trajectory = record_trajectory(pipe, [text for text, _ in pairs], settings, show=show)
        sets.append(SeedSet(settings, trajectory, decode(pipe, trajectory.latents)))
    evaluator = demo.load_evaluator(demo.WEIGHTS)
    return Setup(pipe, calibration, check), Evaluation(pipe, denoiser(pipe), pairs, sets, evaluator, subject.enlarged)
