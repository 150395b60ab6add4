"""Pipelines of videos, transformers, unconditional models, Kandinsky and Stable Cascade."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

from python_tests.breadth import parts
from python_tests.breadth.rows import prompt, row, three
from python_tests.tiny import TEXT_WIDTH

STEPS: dict[str, Any] = {"num_inference_steps": 2}


# -- videos ------------------------------------------------------------------------------------------------------


@row("stable video diffusion", is_large=True)
def _() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        num_attention_heads=4,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    ).eval()
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, layers_per_block=1
    ).eval()
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=parts.image_encoder(224),  # which the pipeline makes of every picture
        unet=unet,
        scheduler=EulerDiscreteScheduler(prediction_type="v_prediction"),
        feature_extractor=parts.feature_extractor(),
    )
    call = {"num_frames": 2, "height": 16, "width": 16, "decode_chunk_size": 2}
    return pipe, three(lambda index: {"image": parts.picture(index)}, **call, **STEPS)


@row("text to video", is_large=True)
def _() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet3DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=2,
    ).eval()
    given = parts.stable_diffusion(unet=unet)
    own = {name: given[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = diffusers.TextToVideoSDPipeline(**own)
    return pipe, three(prompt, num_frames=2, height=16, width=16, **STEPS)


@row("animatediff", is_large=True)
def _() -> Any:
    torch.manual_seed(0)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=4,
    )
    given = parts.stable_diffusion(unet=parts.tiny_unet())
    own = {name: given[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = diffusers.AnimateDiffPipeline(**own, motion_adapter=parts.filled(adapter.eval()))
    return pipe, three(prompt, num_frames=2, height=16, width=16, **STEPS)


def _wan() -> Any:
    def transformer(seed: int) -> Any:
        torch.manual_seed(seed)
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ).eval()

    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=transformer(0),
        transformer_2=transformer(1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        boundary_ratio=0.875,
    )

    def call(index: int) -> dict[str, Any]:
        texts = (("prompt_embeds", 0), ("negative_prompt_embeds", 10))
        return {name: parts.noise(1, 8, TEXT_WIDTH, seed=index + seed) for name, seed in texts}

    return pipe, three(call, num_frames=5, height=16, width=16, num_inference_steps=4)


row("wan 2.2, the first transformer")(_wan)
row("wan 2.2, the second transformer", part="transformer_2")(_wan)


# -- transformers ------------------------------------------------------------------------------------------------


@row("dit, class labels")
def _() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_embeds_ada_norm=1000,
        sample_size=8,
    ).eval()
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=parts.vae(), scheduler=DDIMScheduler())
    return pipe, three(lambda index: {"class_labels": [7 * index]}, guidance_scale=4.0, **STEPS)


@row("pixart sigma")
def _() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    ).eval()
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=parts.vae(), transformer=transformer, scheduler=DDIMScheduler()
    )

    def call(index: int) -> dict[str, Any]:
        texts = {"prompt_embeds": parts.noise(1, 8, TEXT_WIDTH, seed=index)}
        texts["negative_prompt_embeds"] = parts.noise(1, 8, TEXT_WIDTH, seed=index + 10)
        masks = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(1, 8))
        return texts | masks

    common = {"negative_prompt": None, "use_resolution_binning": False, "height": 16, "width": 16}
    return pipe, three(call, **common, **STEPS)


@row("sd3")
def _() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=TEXT_WIDTH,
        out_channels=4,
    ).eval()
    nothing = dict.fromkeys(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    pipe = diffusers.StableDiffusion3Pipeline(
        **nothing, transformer=transformer, vae=parts.vae(shift_factor=0.1), scheduler=FlowMatchEulerDiscreteScheduler()
    )

    def call(index: int) -> dict[str, Any]:
        return {
            "prompt_embeds": parts.noise(1, 8, TEXT_WIDTH, seed=index),
            "negative_prompt_embeds": parts.noise(1, 8, TEXT_WIDTH, seed=index + 10),
            "pooled_prompt_embeds": parts.noise(1, TEXT_WIDTH, seed=index + 20),
            "negative_pooled_prompt_embeds": parts.noise(1, TEXT_WIDTH, seed=index + 30),
        }

    return pipe, three(call, height=16, width=16, **STEPS)


@row("flux")
def _() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    ).eval()
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(
        **nothing, transformer=transformer, vae=parts.vae(shift_factor=0.1), scheduler=FlowMatchEulerDiscreteScheduler()
    )

    def call(index: int) -> dict[str, Any]:
        return {
            "prompt_embeds": parts.noise(1, 8, TEXT_WIDTH, seed=index),
            "pooled_prompt_embeds": parts.noise(1, TEXT_WIDTH, seed=index + 20),
        }

    return pipe, three(call, height=16, width=16, **STEPS)


# -- without a text ----------------------------------------------------------------------------------------------


def _unconditional() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


@row("unconditional, ddim")
def _() -> Any:
    pipe = diffusers.DDIMPipeline(unet=_unconditional(), scheduler=DDIMScheduler())
    return pipe, three(lambda index: {"batch_size": 1 + index}, **STEPS)


@row("unconditional, ddpm")
def _() -> Any:
    pipe = diffusers.DDPMPipeline(unet=_unconditional(), scheduler=DDPMScheduler())
    return pipe, three(lambda _index: {}, **STEPS)


@row("kandinsky 2.2")
def _() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=TEXT_WIDTH,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
    ).eval()
    movq = diffusers.VQModel(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    ).eval()
    pipe = diffusers.KandinskyV22Pipeline(unet=unet, scheduler=DDPMScheduler(), movq=movq)

    def call(index: int) -> dict[str, Any]:
        names = (("image_embeds", 0), ("negative_image_embeds", 10))
        return {name: parts.noise(1, TEXT_WIDTH, seed=index + seed) for name, seed in names}

    return pipe, three(call, height=16, width=16, **STEPS)


def _cascade_unet(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "conditioning_dim": 32,
        "block_out_channels": (32,),
        "num_attention_heads": (2,),
        "down_num_layers_per_block": (1,),
        "up_num_layers_per_block": (1,),
        "down_blocks_repeat_mappers": (1,),
        "up_blocks_repeat_mappers": (1,),
        "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),),
        "clip_text_pooled_in_channels": TEXT_WIDTH,
        "dropout": (0.0,),
        "self_attn": True,
        "switch_level": (False,),
    }
    return diffusers.models.StableCascadeUNet(**(settings | changes)).eval()


@row("stable cascade, the prior")
def _() -> Any:
    prior = _cascade_unet(clip_text_in_channels=TEXT_WIDTH, clip_image_in_channels=TEXT_WIDTH)
    pipe = diffusers.StableCascadePriorPipeline(
        tokenizer=parts.tokenizer(),
        text_encoder=parts.projecting_text_encoder(),
        prior=prior,
        scheduler=DDPMWuerstchenScheduler(),
        resolution_multiple=2.0,
    )
    return pipe, three(prompt, height=16, width=16, guidance_scale=3.0, **STEPS)


@row("stable cascade, the decoder")
def _() -> Any:
    decoder = _cascade_unet(effnet_in_channels=4, timestep_conditioning_type=("sca",))
    vqgan = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=4, latent_channels=4, levels=2)
    pipe = diffusers.StableCascadeDecoderPipeline(
        decoder=decoder,
        tokenizer=parts.tokenizer(),
        text_encoder=parts.projecting_text_encoder(),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=vqgan.eval(),
        latent_dim_scale=4.0,
    )

    def call(index: int) -> dict[str, Any]:
        return prompt(index) | {"image_embeddings": parts.noise(1, 4, 4, 4, seed=index)}

    return pipe, three(call, guidance_scale=2.0, **STEPS)
