"""A Stable Diffusion pipeline in miniature with random weights, and a plan that uses every scheme."""

from __future__ import annotations

import inspect
import json
from itertools import cycle
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldmq_kernels.nn.kinds import CLASSES, kind_of
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.layers import layer_shape, quantizable_layers, refusal
from ldmq_kernels.plans.plan import Plan, model_record

TEXT_WIDTH = 32
TOKENS = 40
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# One resolution, one transformer, 33 layers: an analysis runs the model once for each layer in each format.
SHALLOW = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
PROMPTS = ["a red circle", "a blue square on a grey background"]


def tiny_unet(seed: int = 0, **changes: object) -> UNet2DConditionModel:
    """8x8x4 latents, two resolutions, residual blocks, self- and cross-attention, GEGLU."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(settings | changes)).eval()


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """One token a letter; writes its two files to `folder`."""
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS)


def tiny_pipeline(folder: Path, seed: int = 0, **changes: object) -> StableDiffusionPipeline:
    """16x16 pixels from any prompt of lower-case words; `folder` takes the tokenizer's files, `changes` the UNet."""
    tokenizer = tiny_tokenizer(folder)
    unet = tiny_unet(seed, **changes)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusionPipeline, steps: int = 2) -> Tensor:
    """Pictures of PROMPTS from fixed noise, before rounding to 8 bit."""
    generators = [torch.Generator().manual_seed(index) for index in range(len(PROMPTS))]
    images = pipe(
        PROMPTS, num_inference_steps=steps, generator=generators, output_type="pt", height=16, width=16
    ).images
    return images


def unet_inputs(dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Tensor]:
    """Arguments for one call of `tiny_unet`."""
    generator = torch.Generator().manual_seed(7)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator).to(dtype),
        "timestep": torch.tensor(321),
        "encoder_hidden_states": torch.randn(batch, TOKENS, TEXT_WIDTH, generator=generator).to(dtype),
    }


def run_unet(unet: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The model's output for `unet_inputs`."""
    with torch.no_grad():
        return unet(**unet_inputs(dtype)).sample


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, also in FP8, which torch compares on no CPU."""
    if a.dtype != torch.float8_e4m3fn:
        return torch.equal(a, b)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def mixed_plan(model: nn.Module) -> Plan:
    """Every scheme in turn over the layers, each third 8-bit one smoothed; scales that need no calibration run.

    Stepped ones are in it where the model is called with a timestep: three groups, the middle one of `unet_inputs`.
    """
    generator = torch.Generator().manual_seed(1)
    has_steps = "timestep" in inspect.signature(model.forward).parameters
    plan = Plan(model_record(model), [{"pattern": "*", "scheme": "w8a8-dynamic"}], timestep_groups=[600.0, 300.0])
    taken = [(name, s) for name, s in SCHEMES.items() if has_steps or not s.has_timestep_scales]
    names = {kind: cycle([n for n, s in taken if kind in s.format.layers]) for kind in CLASSES}
    for index, (name, layer) in enumerate(quantizable_layers(model).items()):
        scheme = next(s for name in names[kind_of(layer)] if not refusal(layer, s := SCHEMES[name]))
        if str(scheme) != "w8a8-dynamic":
            plan.exceptions[name] = {"scheme": str(scheme), "reason": "every scheme in turn"}
        if scheme.is_static:
            scale = 0.02 + 0.001 * (index % 10)
            plan.input_scales[name] = [1.2 * scale, scale, 0.7 * scale] if scheme.has_timestep_scales else scale
        if scheme.quantizes_activations and index % 3 == 0:
            exponents = torch.randint(-1, 2, (layer_shape(layer)[1],), generator=generator)
            plan.smoothing[name] = torch.exp2(exponents.float())
    return plan
