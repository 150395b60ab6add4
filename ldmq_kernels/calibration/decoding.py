"""Pictures of latents, by a pipeline's VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """(N, 3, H, W) float32 in [0, 1], the pictures of latents as a pipeline ends with them; gradients run through it.

    Args:
        vae: an autoencoder of diffusers; its config says how latents were scaled.
    """
    config = vae.config
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    scaled = latents / config.scaling_factor
    if mean is not None and deviation is not None:
        mean, deviation = (
            torch.tensor(v, dtype=torch.float32, device=latents.device).view(1, -1, 1, 1) for v in (mean, deviation)
        )
        scaled = (latents * deviation / config.scaling_factor + mean).to(latents.dtype)
    shift = getattr(config, "shift_factor", None) or 0.0
    picture = vae.decode((scaled + shift).to(vae.dtype)).sample
    return (picture.float() / 2 + 0.5).clamp(0, 1)
