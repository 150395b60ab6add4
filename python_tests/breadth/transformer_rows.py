"""Pipelines of further diffusion transformers, up to their latents: their autoencoders are planned by themselves."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from python_tests.breadth import parts
from python_tests.breadth.rows import row, three
from python_tests.integrations import transformers

NOTHING: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "vae": None}
LATENTS: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}


def _texts(tokens: int, width: int, *, masks: bool) -> Any:
    """Calls with and without a text, by its embeddings."""

    def call(index: int) -> dict[str, Any]:
        texts = {"prompt_embeds": parts.noise(1, tokens, width, seed=index)}
        texts["negative_prompt_embeds"] = parts.noise(1, tokens, width, seed=index + 10)
        named = ("prompt_attention_mask", "negative_prompt_attention_mask") if masks else ()
        return texts | dict.fromkeys(named, torch.ones(1, tokens))

    return call


@row("ltx video")
def _() -> Any:
    model, _ = transformers.ltx()
    pipe = diffusers.LTXPipeline(**NOTHING, transformer=model, scheduler=FlowMatchEulerDiscreteScheduler())
    return pipe, three(_texts(5, 24, masks=True), height=64, width=96, num_frames=9, **LATENTS)


@row("cogvideox")
def _() -> Any:
    model, _ = transformers.cogvideox()
    pipe = diffusers.CogVideoXPipeline(**NOTHING, transformer=model, scheduler=CogVideoXDDIMScheduler())
    return pipe, three(_texts(5, 24, masks=False), height=64, width=48, num_frames=5, **LATENTS)


@row("sana")
def _() -> Any:
    model, _ = transformers.sana()
    pipe = diffusers.SanaPipeline(
        **NOTHING,
        transformer=model,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )
    common = {"negative_prompt": None, "use_resolution_binning": False, "height": 256, "width": 192}
    return pipe, three(_texts(5, 24, masks=True), **common, **LATENTS)


@row("hunyuan dit")
def _() -> Any:
    model, _ = transformers.hunyuan_dit()
    pipe = diffusers.HunyuanDiTPipeline(
        **NOTHING,
        transformer=model,
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    def call(index: int) -> dict[str, Any]:
        sizes = {"": (3, 24), "_2": (4, 16)}
        texts = {
            f"{kind}prompt_embeds{which}": parts.noise(1, *size, seed=index + seed)
            for which, size in sizes.items()
            for seed, kind in ((0, ""), (10, "negative_"))
        }
        masks = {
            f"{kind}prompt_attention_mask{which}": torch.ones(1, size[0])
            for which, size in sizes.items()
            for kind in ("", "negative_")
        }
        return texts | masks

    return pipe, three(call, height=64, width=64, use_resolution_binning=False, **LATENTS)


@row("qwen image")
def _() -> Any:
    model, _ = transformers.qwen_image()
    pipe = diffusers.QwenImagePipeline(**NOTHING, transformer=model, scheduler=FlowMatchEulerDiscreteScheduler())

    def call(index: int) -> dict[str, Any]:
        texts = {name: parts.noise(1, 5, 24, seed=index + seed) for name, seed in EMBEDDINGS}
        return texts | {f"{name}_mask": torch.ones(1, 5, dtype=torch.long) for name, _ in EMBEDDINGS}

    return pipe, three(call, height=64, width=48, **LATENTS)


EMBEDDINGS = (("prompt_embeds", 0), ("negative_prompt_embeds", 10))
