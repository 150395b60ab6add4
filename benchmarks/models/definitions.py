"""The models that are measured: how they are made, with random weights, and what a call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Model(NamedTuple):
    """`make` builds it on the current device; `inputs` are one call's keyword arguments, by device, dtype and batch.

    The batch of a UNet is 2, the halves of guidance, and that of a decoder 1, unless another is given.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]


SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
}
TOY_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
TOY_VAE = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def _unet(settings: dict[str, Any]) -> Model:
    size, text = settings["sample_size"], settings["cross_attention_dim"]

    def make() -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(**settings).eval()

    def inputs(device: torch.device, dtype: torch.dtype, batch: int = 2) -> dict[str, Any]:
        sample = _normal(device, dtype, batch, 4, size, size).contiguous(memory_format=torch.channels_last)
        found: dict[str, Any] = {
            "sample": sample,
            "timestep": torch.full((), 500, device=device),
            "encoder_hidden_states": _normal(device, dtype, batch, 77, text),
            "return_dict": False,
        }
        if "addition_embed_type" in settings:
            ids = torch.full((batch, 6), 1024.0, device=device).to(dtype)
            found["added_cond_kwargs"] = {"text_embeds": _normal(device, dtype, batch, 1280), "time_ids": ids}
        return found

    return Model(make, inputs)


class Decoder(nn.Module):
    """The part of a VAE that draws the picture."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        """(N, 4, H, W) to (N, 3, 8 H, 8 W)."""
        return (self.decoder(self.post_quant_conv(latents)),)


def _decoder(settings: dict[str, Any], size: int) -> Model:
    def make() -> nn.Module:
        from diffusers import AutoencoderKL

        return Decoder(AutoencoderKL(**settings)).eval()

    def inputs(device: torch.device, dtype: torch.dtype, batch: int = 1) -> dict[str, Any]:
        latents = _normal(device, dtype, batch, 4, size, size)
        return {"latents": latents.contiguous(memory_format=torch.channels_last)}

    return Model(make, inputs)


def decoder_of_512() -> Model:
    """A VAE's decoder that draws 512x512."""
    return _decoder(VAE, 64)


def pixart() -> Model:
    """A transformer of PixArt's width at 512x512, 1024 tokens and 120 of text, with eight of its 28 blocks."""

    def make() -> nn.Module:
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel(sample_size=64, num_layers=8, caption_channels=4096).eval()

    def inputs(device: torch.device, dtype: torch.dtype, batch: int = 2) -> dict[str, Any]:
        return {
            "hidden_states": _normal(device, dtype, batch, 4, 64, 64),
            "encoder_hidden_states": _normal(device, dtype, batch, 120, 4096),
            "timestep": torch.full((batch,), 500, device=device),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }

    return Model(make, inputs)


def demo() -> Model:
    """The demo model's UNet, whose weights are trained, in float32."""

    def make() -> nn.Module:
        from ldmq_kernels.demo import load_demo_pipeline

        return load_demo_pipeline(torch.float32).unet

    def inputs(device: torch.device, dtype: torch.dtype, batch: int = 2) -> dict[str, Any]:
        return {
            "sample": _normal(device, dtype, batch, 4, 8, 8),
            "timestep": torch.full((), 500, device=device),
            "encoder_hidden_states": _normal(device, dtype, batch, 16, 128),
            "return_dict": False,
        }

    return Model(make, inputs)


MODELS = {"sd15": _unet(SD15), "sdxl": _unet(SDXL), "vae_decoder": _decoder(VAE, 128)}
TOYS = {"sd15": _unet(TOY_UNET), "sdxl": _unet(TOY_UNET), "vae_decoder": _decoder(TOY_VAE, 8)}
