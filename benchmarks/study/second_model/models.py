"""The parts of the second model, in StableDiffusion3Pipeline layout.

It draws the demo's scenes at 128x128 pixels: 16x16x4 latents of the demo's own autoencoder, captions read by the
demo's own text encoder, and a transformer of 1.7 million parameters in between, in which patches of 2x2 latents and
words attend to one another, as in Stable Diffusion 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldmq_kernels import demo

LATENT_SIZE = 16
TEXT_WIDTH = 256  # the demo's encoder stands in both places that the pipeline has for one
SHIFT = 2.0  # of the noise levels: a picture of plain areas is decided while there is much noise
LATENT_SCALE = 0.79  # one over the standard deviation of the training scenes' latents
TRANSFORMER: dict[str, Any] = {
    "sample_size": LATENT_SIZE,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 5,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "caption_projection_dim": 96,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "pos_embed_max_size": LATENT_SIZE,
    "qk_norm": "rms_norm",
}


class ScenePipeline(StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline, but a missing T5 encoder stands for one empty token by default, not for 256."""

    def __call__(self, *args: Any, max_sequence_length: int = 1, **kwargs: Any) -> Any:
        """Draw as StableDiffusion3Pipeline does."""
        return super().__call__(*args, max_sequence_length=max_sequence_length, **kwargs)


def build_transformer() -> SD3Transformer2DModel:
    """16x16x4 latents in 64 patches, 96 wide, five blocks; 1.7 million parameters."""
    return SD3Transformer2DModel(**TRANSFORMER)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along the flow, most of them where there is much noise."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def _text_encoder(folder: Path, dtype: torch.dtype) -> CLIPTextModelWithProjection:
    """The demo's text encoder, whose pooled state is passed on as it is."""
    trained = CLIPTextModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
    encoder = CLIPTextModelWithProjection(trained.config).to(dtype).eval()
    state = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in trained.state_dict().items()}
    encoder.load_state_dict(state | {"text_projection.weight": torch.eye(trained.config.hidden_size, dtype=dtype)})
    return encoder


def build_pipeline(transformer: SD3Transformer2DModel, folder: Path = demo.WEIGHTS) -> Any:
    """The pipeline of a transformer, all of it in its dtype, on the CPU.

    Args:
        folder: of the demo model's weights.

    Raises:
        FileNotFoundError: the demo model's weights are not there.
    """
    demo.check_weights(folder)
    dtype = transformer.dtype
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, local_files_only=True)
    vae.register_to_config(scaling_factor=LATENT_SCALE, shift_factor=0.0)
    encoder = _text_encoder(folder / "text_encoder", dtype)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    pipe = ScenePipeline(
        transformer=transformer,
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
