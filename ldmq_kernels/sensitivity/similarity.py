"""A second signal: structural similarity of the picture that the UNet's output leads to.

Noise of the same power can change what a picture shows or only its grain; SQNR does not tell these apart, and
plans for cross-attention and feed-forward layers that look at SQNR alone can lose the picture's content (Zhao et
al., MixDQ, arXiv 2405.17873). So the output at a step in the middle is guided, turned into the clean latent that
it predicts, decoded, and compared with the float one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.decoding import decoded
from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall, replay

SSIM = "ssim"  # the signal's name
SCORED = (".attn2.", ".ff.")


def scored_layers(names: Iterable[str]) -> list[str]:
    """Cross-attention and feed-forward layers: what this signal is for."""
    return [name for name in names if any(part in f".{name}." for part in SCORED)]


def middle_step(trajectory: Trajectory) -> Trajectory:
    """The calls of the middle one of the trajectory's steps."""
    steps = sorted({call.step for call in trajectory.calls})
    return trajectory.at_steps([steps[len(steps) // 2]])


def _predicted_latent(scheduler: Any, call: UNetCall, output: Tensor) -> Tensor:
    sample = call.args[0] if call.args else call.kwargs["sample"]
    if call.guidance_scale is not None:
        unconditional, conditional = output.chunk(2)
        output, sample = unconditional + call.guidance_scale * (conditional - unconditional), sample.chunk(2)[0]
    alphas = scheduler.alphas_cumprod
    alpha = float(alphas[min(round(call.timestep), len(alphas) - 1)])
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return output
    if kind == "v_prediction":
        return alpha**0.5 * sample - (1 - alpha) ** 0.5 * output
    return (sample - (1 - alpha) ** 0.5 * output) / alpha**0.5


class Decoder:
    """Pictures that the UNet's outputs along a trajectory lead to.

    Args:
        pipe: a pipeline with a VAE and a scheduler that knows `alphas_cumprod`.

    Raises:
        TypeError: the pipeline lacks one of them.
    """

    def __init__(self, pipe: Any) -> None:
        if not hasattr(getattr(pipe, "scheduler", None), "alphas_cumprod") or getattr(pipe, "vae", None) is None:
            raise TypeError(
                f"structural similarity needs a VAE and a scheduler with alphas_cumprod, {type(pipe).__name__} has "
                f"{type(getattr(pipe, 'scheduler', None)).__name__}: plan by SQNR alone"
            )
        self._vae, self._scheduler = pipe.vae, pipe.scheduler

    def __call__(self, call: UNetCall, output: Tensor) -> Tensor:
        """(prompts, 3, H, W) in [0, 1]."""
        return decoded(self._vae, _predicted_latent(self._scheduler, call, output))


@torch.no_grad()
def float_pictures(trajectory: Trajectory, decoder: Decoder) -> list[Tensor]:
    """The pictures of a float trajectory, call by call."""
    return [decoder(call, call.output) for call in trajectory.calls]


@torch.no_grad()
def structural_noise(model: nn.Module, trajectory: Trajectory, decoder: Decoder, exact: list[Tensor]) -> float:
    """1 - the mean structural similarity between the model's pictures as it is now and the float ones.

    Args:
        exact: the `float_pictures`.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarities = [
        structural_similarity_index_measure(decoder(call, output), picture, data_range=1.0, reduction="none")
        for (call, output), picture in zip(replay(model, trajectory), exact, strict=True)
    ]
    return 1.0 - float(torch.cat([torch.as_tensor(value).reshape(-1) for value in similarities]).mean())
