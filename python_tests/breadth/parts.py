"""Small random parts of pipelines: the real classes of diffusers and transformers, with as few layers as they take."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from python_tests.tiny import SHALLOW, TEXT_WIDTH, TOKENS, tiny_tokenizer, tiny_unet

PIXELS = 16


@cache
def tokenizer() -> CLIPTokenizer:
    """One token a letter."""
    with tempfile.TemporaryDirectory() as folder:
        return tiny_tokenizer(Path(folder))


def _text_config() -> CLIPTextConfig:
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def text_encoder() -> CLIPTextModel:
    """Two layers, 32 wide."""
    torch.manual_seed(1)
    return CLIPTextModel(_text_config()).eval()


def projecting_text_encoder() -> CLIPTextModelWithProjection:
    """The same with a projection."""
    torch.manual_seed(2)
    return CLIPTextModelWithProjection(_text_config()).eval()


def image_encoder(pixels: int = 8) -> CLIPVisionModelWithProjection:
    """Two layers, 32 wide, of four patches."""
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=pixels,
        patch_size=pixels // 2,
        projection_dim=TEXT_WIDTH,
    )
    return CLIPVisionModelWithProjection(config).eval()


def feature_extractor() -> CLIPImageProcessor:
    """Of pictures of 8 pixels."""
    return CLIPImageProcessor(crop_size=8, size=8)


def vae(**changes: Any) -> AutoencoderKL:
    """16x16 pixels to 8x8x4 latents."""
    torch.manual_seed(4)
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": PIXELS,
    }
    return AutoencoderKL(**(settings | changes)).eval()


def unet(**changes: Any) -> UNet2DConditionModel:
    """One resolution, one transformer, 33 layers."""
    return tiny_unet(**(SHALLOW | changes))


def xl_unet(**changes: Any) -> UNet2DConditionModel:
    """An SDXL UNet of one resolution, which reads text of both encoders and sizes."""
    settings: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
        "cross_attention_dim": 2 * TEXT_WIDTH,
        "use_linear_projection": True,
    }
    return unet(**(settings | changes))


def controlnet(**changes: Any) -> ControlNetModel:
    """Of the same structure as `unet`, with weights in its zero convolutions."""
    torch.manual_seed(5)
    settings: dict[str, Any] = {
        "block_out_channels": (32,),
        "down_block_types": ("DownBlock2D",),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "conditioning_embedding_out_channels": (8, 16),
    }
    return filled(ControlNetModel(**(settings | changes)).eval())


def filled(model: Any) -> Any:
    """The model with small random numbers where it has zeros, which training would have filled."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def t2i_adapter(kind: str) -> T2IAdapter:
    """Of one resolution."""
    torch.manual_seed(7)
    return T2IAdapter(in_channels=3, channels=[32], num_res_blocks=1, downscale_factor=2, adapter_type=kind).eval()


def stable_diffusion(**changes: Any) -> dict[str, Any]:
    """The components of a Stable Diffusion pipeline."""
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet(),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    } | changes


def stable_diffusion_xl(**changes: Any) -> dict[str, Any]:
    """The components of an SDXL pipeline."""
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "text_encoder_2": projecting_text_encoder(),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": xl_unet(),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "add_watermarker": False,
    } | changes


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Fixed normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 0, pixels: int = PIXELS) -> Image.Image:
    """A picture of random colours."""
    values = torch.rand(pixels, pixels, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((values * 255).byte().numpy())


def mask(pixels: int = PIXELS) -> Image.Image:
    """White in its left half."""
    whole = Image.new("L", (pixels, pixels), 0)
    whole.paste(255, (0, 0, pixels // 2, pixels))
    return whole


def add_ip_adapter(model: nn.Module, text_width: int = TEXT_WIDTH) -> None:
    """An IP-Adapter with random weights on a UNet, as `load_ip_adapter` puts it there."""
    weights: dict[str, Tensor] = {}
    names = [name for name in model.attn_processors if name.endswith("attn2.processor")]  # type: ignore[union-attr]
    for index, name in enumerate(names):
        hidden = model.get_submodule(name.removesuffix(".processor")).to_q.out_features  # type: ignore[union-attr]
        for which, seed in (("k", 2 * index), ("v", 2 * index + 1)):
            weights[f"{2 * index + 1}.to_{which}_ip.weight"] = noise(hidden, text_width, seed=seed) / 5
    projection = {
        "proj.weight": noise(4 * text_width, TEXT_WIDTH, seed=50) / 5,
        "proj.bias": noise(4 * text_width, seed=51),
        "norm.weight": torch.ones(text_width),
        "norm.bias": torch.zeros(text_width),
    }
    model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])  # type: ignore[operator]
