"""Diffusion transformers in miniature, with random weights and the arguments of one call of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

WIDTH = 32
Built = tuple[nn.Module, dict[str, Any]]


def noise(*sizes: int, seed: int = 0) -> Tensor:
    """Normal values."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def flux() -> Built:
    """One double and one single block; a batch of two."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    call = {
        "hidden_states": noise(2, 12, 4),
        "encoder_hidden_states": noise(2, 5, 32, seed=1),
        "pooled_projections": noise(2, 32, seed=2),
        "timestep": torch.tensor([0.7, 0.3]),
        "img_ids": noise(12, 3, seed=3).abs(),
        "txt_ids": torch.zeros(5, 3),
    }
    return model.eval(), call


def wan(**changes: Any) -> Built:
    """One block; a batch of two videos of two latent frames."""
    torch.manual_seed(0)
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": 1,
        "cross_attn_norm": True,
        "rope_max_seq_len": 32,
    }
    model = diffusers.WanTransformer3DModel(**(settings | changes))
    call = {
        "hidden_states": noise(2, 4, 2, 6, 4),
        "timestep": torch.tensor([700, 300]),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
    }
    return model.eval(), call


def pixart() -> Built:
    """One block whose norms are modulated from a table; a batch of two, with a mask over the text."""
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32,
        caption_channels=24,
        norm_num_groups=8,
        use_additional_conditions=False,
    )
    call = {
        "hidden_states": noise(2, 4, 8, 6),
        "timestep": torch.tensor([700, 300]),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_attention_mask": torch.tensor([[1.0] * 7, [1.0] * 3 + [0.0] * 4]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model.eval(), call


TRANSFORMERS: dict[str, Callable[[], Built]] = {"flux": flux, "pixart": pixart, "wan": wan}


@torch.no_grad()
def run(model: nn.Module, call: dict[str, Any]) -> Tensor:
    """The model's output."""
    return model(**call, return_dict=False)[0]
