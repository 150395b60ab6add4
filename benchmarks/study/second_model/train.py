"""Train the second model's transformer: `python -m benchmarks.study.second_model.train --work DIR`.

The autoencoder and the text encoder are the demo's. Every batch is a function of the seed and the step number, and a
run that was stopped goes on from its last checkpoint. What the weights beside this file cost is in README.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from benchmarks.study.second_model import ENLARGED, WEIGHTS, models
from ldmq_kernels.demo import scenes
from ldmq_kernels.demo.train import (
    DROPPED_CAPTIONS,
    SEED,
    device,
    fit,
    generator,
    moving_average,
    save_whole,
    scenes_of_step,
)
from ldmq_kernels.progress import track

SCENES, AT_ONCE = 8192, 4  # few at once: the encoder's maps then fit a core's cache
FIRST_SCENE = 2_000_000
SPREAD = 1.2  # of the noise levels' logits
STEPS, BATCH, LEARNING_RATE = 6000, 16, 1e-3


@torch.no_grad()
def encoded(work: Path, count: int = SCENES) -> dict[str, Tensor]:
    """Latents and text states of the training scenes, encoded once and kept in `work/latents.pt`.

    Returns:
        "latents" (count, 4, 16, 16) in the transformer's scale; "states" (count, 25, 256) and "pooled" (count, 256)
        of their captions, bfloat16; "no_states" and "no_pooled" of the empty caption.
    """
    path = work / "latents.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    pipe = models.build_pipeline(models.build_transformer()).to(device())
    latents, states, pooled = [], [], []

    def read(texts: list[str]) -> tuple[Tensor, Tensor]:
        found = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False, max_sequence_length=1)
        return found[0].to(torch.bfloat16).cpu(), found[2].to(torch.bfloat16).cpu()

    for part in track(range(count // AT_ONCE), "latents", count // AT_ONCE, show=True):
        texts, drawn = scenes_of_step(AT_ONCE, FIRST_SCENE + part)
        pictures = scenes.render(drawn, generator(FIRST_SCENE + part), ENLARGED).to(device())
        latents.append((pipe.vae.encode(pictures).latent_dist.mean * models.LATENT_SCALE).cpu())
        for kept, value in zip((states, pooled), read(texts), strict=True):
            kept.append(value)
    no_states, no_pooled = read([""])
    kept = {"latents": torch.cat(latents), "states": torch.cat(states), "pooled": torch.cat(pooled)}
    kept |= {"no_states": no_states, "no_pooled": no_pooled}
    work.mkdir(parents=True, exist_ok=True)
    save_whole(kept, path)
    return kept


def _start(model: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Blocks that pass their input on, and no output, as in DiT (arXiv 2212.09748, adaLN-Zero)."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (".norm1" in name or name.startswith(("norm_out", "proj_out"))):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def noise_levels(count: int, random: torch.Generator) -> Tensor:
    """(count,) in 0..1: logit-normal (Stable Diffusion 3, arXiv 2403.03206), shifted as the scheduler's are."""
    level = (SPREAD * torch.randn(count, generator=random)).sigmoid()
    return models.SHIFT * level / (1 + (models.SHIFT - 1) * level)


def train(work: Path, steps: int = STEPS, count: int = SCENES, size: int = BATCH) -> nn.Module:
    """The transformer's moving average after training; goes on from `work/transformer.pt` where that exists."""
    data = encoded(work, count)
    torch.manual_seed(SEED + 4)
    model = _start(models.build_transformer()).to(device())
    average, follow = moving_average(model)

    def loss_of(step: int) -> Tensor:
        random = generator(step)
        index = torch.randint(len(data["latents"]), (size,), generator=random)
        level = noise_levels(size, random)
        dropped = torch.rand(size, generator=random) < DROPPED_CAPTIONS
        latents = data["latents"][index]
        noise = torch.randn(latents.shape, generator=random)
        given = level.view(-1, 1, 1, 1)
        predicted = model(
            hidden_states=((1 - given) * latents + given * noise).to(device()),
            timestep=1000 * level.to(device()),
            encoder_hidden_states=_unless(dropped, data["states"][index], data["no_states"]).to(device()),
            pooled_projections=_unless(dropped, data["pooled"][index], data["no_pooled"]).to(device()),
        ).sample
        return (predicted.float() - (noise - latents).to(device())).square().mean()

    fit(
        "transformer",
        model,
        loss_of,
        steps=steps,
        learning_rate=LEARNING_RATE,
        work=work,
        after_step=follow,
        extra=average,
    )
    return average


def _unless(dropped: Tensor, states: Tensor, empty: Tensor) -> Tensor:
    """The captions' states, or the empty caption's where it is dropped."""
    return torch.where(dropped.view(-1, *[1] * (states.dim() - 1)), empty, states).float()


def export(model: nn.Module, out: Path = WEIGHTS) -> None:
    """Write the transformer in float16, as diffusers does."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.to(torch.float16).save_pretrained(part)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def main(
    work: Annotated[Path, typer.Option(help="folder for checkpoints and caches")],
    steps: int = STEPS,
    out: Annotated[Path, typer.Option(help="folder for the trained transformer")] = WEIGHTS,
) -> None:
    """Train, or go on, and write the weights."""
    export(train(work, steps), out)


if __name__ == "__main__":
    typer.run(main)
