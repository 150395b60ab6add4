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


def sd3() -> Built:
    """Two joint blocks: the first has a second attention to the picture, the last no feed-forward of the text."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    call = {
        "hidden_states": noise(2, 4, 8, 6),
        "encoder_hidden_states": noise(2, 5, 24, seed=1),
        "pooled_projections": noise(2, 16, seed=2),
        "timestep": torch.tensor([700.0, 300.0]),
    }
    return model.eval(), call


def cogvideox() -> Built:
    """One block; a batch of two videos of two latent frames."""
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=1,
        sample_width=6,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=5,
    )
    call = {
        "hidden_states": noise(2, 2, 4, 8, 6),
        "encoder_hidden_states": noise(2, 5, 24, seed=1),
        "timestep": torch.tensor([700, 300]),
    }
    return model.eval(), call


def sana() -> Built:
    """One block, with linear attention and the convolutions of its feed-forward."""
    torch.manual_seed(0)
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
    )
    call = {
        "hidden_states": noise(2, 4, 8, 6),
        "encoder_hidden_states": noise(2, 5, 24, seed=1),
        "timestep": torch.tensor([700, 300]),
    }
    return model.eval(), call


def ltx() -> Built:
    """One block; a batch of two videos of two latent frames."""
    torch.manual_seed(0)
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=24,
    )
    call = {
        "hidden_states": noise(2, 12, 4),
        "encoder_hidden_states": noise(2, 5, 24, seed=1),
        "timestep": torch.tensor([[700], [300]]),
        "encoder_attention_mask": torch.ones(2, 5),
        "num_frames": 2,
        "height": 2,
        "width": 3,
    }
    return model.eval(), call


def hunyuan_dit() -> Built:
    """Two blocks, the second with a skip from the first."""
    torch.manual_seed(0)
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=3,
        text_len_t5=4,
        use_style_cond_and_image_meta_size=False,
    )
    angles = noise(16, 16, seed=4)
    call = {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([700.0, 300.0]),
        "encoder_hidden_states": noise(2, 3, 24, seed=1),
        "text_embedding_mask": torch.ones(2, 3),
        "encoder_hidden_states_t5": noise(2, 4, 16, seed=2),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    return model.eval(), call


def qwen_image() -> Built:
    """One block of two streams."""
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    call = {
        "hidden_states": noise(2, 12, 16),
        "encoder_hidden_states": noise(2, 5, 24, seed=1),
        "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.long),
        "timestep": torch.tensor([0.7, 0.3]),
        "img_shapes": [[(1, 4, 3)], [(1, 4, 3)]],
    }
    return model.eval(), call


OF_OWN_FUSED_BLOCKS: dict[str, Callable[[], Built]] = {"flux": flux, "pixart": pixart, "sd3": sd3, "wan": wan}
TRANSFORMERS: dict[str, Callable[[], Built]] = OF_OWN_FUSED_BLOCKS | {
    "cogvideox": cogvideox,
    "hunyuan dit": hunyuan_dit,
    "ltx": ltx,
    "qwen image": qwen_image,
    "sana": sana,
}


@torch.no_grad()
def run(model: nn.Module, call: dict[str, Any]) -> Tensor:
    """The model's output."""
    return model(**call, return_dict=False)[0]
