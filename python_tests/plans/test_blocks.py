"""Blocks come from a model's own lists, whatever its class calls them."""

from __future__ import annotations

import pytest
from diffusers import AutoencoderKL, FluxTransformer2DModel, PixArtTransformer2DModel

from ldmq_kernels.plans.blocks import block_of
from ldmq_kernels.plans.layers import quantizable_layers
from python_tests.tiny import tiny_unet


def blocks(model):
    return {name: block_of(model, name) for name in quantizable_layers(model)}


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("conv_in", "conv_in"),
        ("time_embedding.linear_1", "time_embedding"),
        ("down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0"),
        ("down_blocks.0.downsamplers.0.conv", "down_blocks.0.downsamplers.0"),
        ("mid_block.attentions.0.proj_in", "mid_block.attentions.0"),
        ("up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2", "up_blocks.1.attentions.1"),
    ],
)
def test_blocks_of_a_unet_are_residual_blocks_transformers_and_samplers(layer: str, block: str) -> None:
    assert blocks(tiny_unet())[layer] == block


def test_blocks_of_a_transformer_are_the_entries_of_its_lists() -> None:
    settings = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    pixart = PixArtTransformer2DModel(
        in_channels=4, out_channels=8, cross_attention_dim=16, caption_channels=16, **settings
    )
    assert {"transformer_blocks.0", "transformer_blocks.1", "pos_embed", "adaln_single", "proj_out"} <= set(
        blocks(pixart).values()
    )
    flux = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    assert {"transformer_blocks.0", "single_transformer_blocks.1", "x_embedder", "norm_out"} <= set(
        blocks(flux).values()
    )


def test_blocks_of_a_vae_are_the_stages_of_its_decoder() -> None:
    found = set(blocks(AutoencoderKL(block_out_channels=(32, 32), up_block_types=("UpDecoderBlock2D",) * 2)).values())
    assert {"decoder.up_blocks.0", "decoder.up_blocks.1", "decoder", "post_quant_conv"} <= found
