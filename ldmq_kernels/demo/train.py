"""Train the demo model from nothing: `python -m ldmq_kernels.demo.train STAGE --work DIR`.

Stages, in order: `evaluator`, `text`, `vae`, `unet`, `export`. Every batch is a function of the
seed and the step number, and a stage goes on from its last checkpoint, so a run that was stopped
ends where an uninterrupted one does. What the shipped weights cost is in README.md beside this file.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ldmq_kernels.demo import models, scenes
from ldmq_kernels.demo.evaluator import CLASSES, AttributeHeads, Evaluator, attribute_accuracy, attribute_loss, targets
from ldmq_kernels.files import output_folder

SEED = 20240
LATENT_SCENES = 65_536
CHECKPOINT_EVERY = 200
DROPPED_CAPTIONS = 0.1
OBJECT_WEIGHT = 4.0
EMA_DECAY = 0.999

app = typer.Typer(add_completion=False, no_args_is_help=True)
Work = Annotated[Path, typer.Option(help="folder for checkpoints and caches")]


def generator(step: int) -> torch.Generator:
    """The source of a step's random numbers."""
    return torch.Generator().manual_seed(SEED * 1_000_003 + step)


def scenes_of_step(count: int, step: int) -> tuple[list[str], list[scenes.Scene]]:
    """`count` captions of a step with their scenes, half of one object and half of two, none held out."""
    pairs = [
        pair
        for objects in (1, 2)
        for pair in scenes.captions(count // 2, objects, held_out=False, seed=SEED * 7 + 2 * step + objects)
    ]
    return [caption for caption, _ in pairs], [scene for _, scene in pairs]


def device() -> torch.device:
    """Where training runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_whole(state: object, path: Path) -> None:
    """`torch.save`, so that the file is there whole or as it was before."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def _in_bfloat16() -> torch.autocast:
    """Autocast, off on a processor that has no bfloat16 arithmetic: emulated, it is slower than float32."""
    here = device().type
    fast = here != "cpu" or bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return torch.autocast(here, torch.bfloat16, enabled=fast)


def moving_average(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    """A copy of a model without gradients, and what brings it nearer to the model after each step."""
    average = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def follow() -> None:
        for old, new in zip(average.parameters(), model.parameters(), strict=True):
            old.lerp_(new, 1 - EMA_DECAY)

    return average, follow


def fit(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    work: Path,
    after_step: Callable[[], None] = lambda: None,
    extra: nn.Module | None = None,
) -> None:
    """AdamW with warm-up and cosine decay, resumed from `work/<name>.pt` where that exists.

    Args:
        loss_of: step number -> scalar loss of that step's batch, under bfloat16 autocast where that is fast.
        extra: a module without gradients that is kept beside the model (its moving average).
    """
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / f"{name}.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device(), weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if extra is not None:
            extra.load_state_dict(state["extra"])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=steps, completed=first)
        for step in range(first, steps):
            warm = min(1.0, (step + 1) / 200)
            rate = learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with _in_bfloat16():
                loss = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            after_step()
            progress.update(bar, advance=1, description=f"{name} {loss.item():.4f}")
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
                kept = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_whole(kept | ({"extra": extra.state_dict()} if extra is not None else {}), checkpoint)


@app.command()
def evaluator(work: Work, steps: int = 2500) -> None:
    """Train the attribute classifier on rendered pictures, some of them noisy or blurred."""
    torch.manual_seed(SEED)
    model = Evaluator().to(device())

    def loss_of(step: int) -> Tensor:
        _, drawn = scenes_of_step(64, step)
        random = generator(step)
        pictures = scenes.render(drawn, random)
        blurred = nn.functional.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
        mix = torch.rand(len(drawn), 1, 1, 1, generator=random)
        noise = torch.randn(pictures.shape, generator=random) * 0.1 * torch.rand(mix.shape, generator=random)
        pictures = torch.lerp(pictures, blurred, mix) + noise
        labels = {name: index.to(device()) for name, index in targets(drawn).items()}
        return attribute_loss(model(pictures.to(device())), labels)

    fit("evaluator", model, loss_of, steps=steps, learning_rate=2e-3, work=work)
    pairs = [pair for objects in (1, 2) for pair in scenes.captions(1000, objects, held_out=True, seed=1)]
    drawn = [scene for _, scene in pairs]
    with torch.no_grad():
        logits = model(scenes.render(drawn, generator(0)).to(device()))
    accuracy = attribute_accuracy({name: value.cpu() for name, value in logits.items()}, drawn)
    print(f"evaluator: {accuracy:.2%} of the attributes of held-out rendered pictures")


def _tokenizer(work: Path) -> CLIPTokenizer:
    return models.build_tokenizer(work / "tokenizer")


def _tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    tokens = tokenizer(texts, padding="max_length", max_length=models.TOKENS, truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device())


@app.command()
def text(work: Work, steps: int = 2500) -> None:
    """Train the text encoder to tell a caption's attributes, in place of CLIP's contrast with pictures."""
    torch.manual_seed(SEED + 1)
    tokenizer = _tokenizer(work)
    encoder = models.build_text_encoder(tokenizer)
    model = nn.ModuleDict({"encoder": encoder, "heads": AttributeHeads(models.TEXT_WIDTH)}).to(device())

    def loss_of(step: int) -> Tensor:
        texts, drawn = scenes_of_step(128, step)
        labels = {name: index.to(device()) for name, index in targets(drawn).items()}
        return attribute_loss(model["heads"](encoder(_tokens(tokenizer, texts)).pooler_output), labels)

    fit("text", model, loss_of, steps=steps, learning_rate=1e-3, work=work)
    pairs = [pair for objects in (1, 2) for pair in scenes.captions(1000, objects, held_out=True, seed=1)]
    with torch.no_grad():
        logits = model["heads"](encoder(_tokens(tokenizer, [caption for caption, _ in pairs])).pooler_output)
    accuracy = attribute_accuracy({k: v.cpu() for k, v in logits.items()}, [scene for _, scene in pairs])
    print(f"text encoder: {accuracy:.2%} of the attributes of held-out captions")


def _trained_text_encoder(work: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    tokenizer = _tokenizer(work)
    encoder = models.build_text_encoder(tokenizer)
    state = torch.load(work / "text.pt", map_location="cpu", weights_only=True)["model"]
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")})
    return tokenizer, encoder.to(device()).eval()


@app.command()
def vae(work: Work, steps: int = 2600) -> None:
    """Train the autoencoder: absolute and squared error of pixels, objects weighing more, and a little KL."""
    torch.manual_seed(SEED + 2)
    model = models.build_vae().to(device())
    model.set_attn_processor(AttnProcessor())

    def loss_of(step: int) -> Tensor:
        _, drawn = scenes_of_step(32, step)
        random = generator(step)
        pictures = scenes.render(drawn, random).to(device())
        posterior = model.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=random).to(device())
        restored = model.decode(posterior.mean + posterior.std * noise).sample.float()
        drawn_on = (pictures != pictures[:, :, :1, :1]).any(1, keepdim=True)
        weight = 1 + OBJECT_WEIGHT * drawn_on
        difference = restored - pictures
        return (weight * (difference.abs() + difference.square())).mean() + 1e-6 * posterior.kl().float().mean()

    fit("vae", model, loss_of, steps=steps, learning_rate=2e-3, work=work)


def _trained_vae(work: Path) -> AutoencoderKL:
    model = models.build_vae()
    model.load_state_dict(torch.load(work / "vae.pt", map_location="cpu", weights_only=True)["model"])
    return model.to(device()).eval()


def _latents(work: Path) -> dict[str, Tensor]:
    """Latents and text states of the training scenes, encoded once; scaled to unit deviation."""
    path = work / "latents.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    tokenizer, encoder = _trained_text_encoder(work)
    autoencoder = _trained_vae(work)
    latents, states = [], []
    with torch.no_grad(), torch.autocast(device().type, torch.bfloat16):
        for step in range(LATENT_SCENES // 256):
            texts, drawn = scenes_of_step(256, 1_000_000 + step)
            pictures = scenes.render(drawn, generator(1_000_000 + step)).to(device())
            latents.append(autoencoder.encode(pictures).latent_dist.mean.float().cpu())
            states.append(encoder(_tokens(tokenizer, texts)).last_hidden_state.to(torch.bfloat16).cpu())
        empty = encoder(_tokens(tokenizer, [""])).last_hidden_state.to(torch.bfloat16).cpu()
    joined = torch.cat(latents)
    scale = 1 / joined.std()
    kept = {"latents": joined * scale, "scale": scale, "states": torch.cat(states), "empty": empty}
    save_whole(kept, path)
    return kept


@app.command()
def unet(work: Work, steps: int = 4400, batch: int = 64, learning_rate: float = 6e-4) -> None:
    """Train the UNet on velocity, with a tenth of the captions dropped for classifier-free guidance."""
    data = _latents(work)
    torch.manual_seed(SEED + 3)
    model = models.build_unet().to(device())
    average, follow = moving_average(model)
    model.set_attn_processor(AttnProcessor())  # the fused attention's backward is twice the rest on a CPU
    signal = models.build_scheduler().alphas_cumprod

    def loss_of(step: int) -> Tensor:
        random = generator(step)
        index = torch.randint(len(data["latents"]), (batch,), generator=random)
        steps_of_noise = torch.randint(len(signal), (batch,), generator=random)
        latents = data["latents"][index]
        noise = torch.randn(latents.shape, generator=random)
        dropped = torch.rand(batch, 1, 1, generator=random) < DROPPED_CAPTIONS
        states = torch.where(dropped, data["empty"], data["states"][index]).to(device())
        keep = signal[steps_of_noise].view(-1, 1, 1, 1)
        noisy = keep.sqrt() * latents + (1 - keep).sqrt() * noise
        velocity = (keep.sqrt() * noise - (1 - keep).sqrt() * latents).to(device())
        predicted = model(noisy.to(device()), steps_of_noise.to(device()), states).sample
        return (predicted.float() - velocity).square().mean()

    fit("unet", model, loss_of, steps=steps, learning_rate=learning_rate, work=work, after_step=follow, extra=average)


@app.command()
def export(work: Work, out: Annotated[Path, typer.Option(help="folder for the trained model")]) -> None:
    """Write the trained parts as a StableDiffusionPipeline directory in float16, and the evaluator beside it.

    An earlier result is replaced, and no other folder.
    """
    with output_folder(out, lambda _, names: {"evaluator", "model_index.json"} <= set(names)) as write:
        write(partial(_write_trained, work))


def _write_trained(work: Path, folder: Path) -> None:
    tokenizer, encoder = _trained_text_encoder(work)
    autoencoder = _trained_vae(work)
    autoencoder.register_to_config(scaling_factor=float(_latents(work)["scale"]))
    network = models.build_unet()
    network.load_state_dict(torch.load(work / "unet.pt", map_location="cpu", weights_only=True)["extra"])
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=network,
        scheduler=models.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    state = torch.load(work / "evaluator.pt", map_location="cpu", weights_only=True)["model"]
    (folder / "evaluator").mkdir()
    halves = {k: v.half().contiguous() for k, v in state.items()}
    save_file(halves, folder / "evaluator" / "model.safetensors", {"attributes": ",".join(CLASSES)})


if __name__ == "__main__":
    app()
