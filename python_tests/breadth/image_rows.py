"""Pipelines of Stable Diffusion and SDXL, with and without pictures, conditions and adapters."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from python_tests.breadth import parts
from python_tests.breadth.rows import PROMPTS, prompt, row, three
from python_tests.tiny import TEXT_WIDTH

SIZE: dict[str, Any] = {"height": parts.PIXELS, "width": parts.PIXELS}
STEPS: dict[str, Any] = {"num_inference_steps": 2}
DRAWN = SIZE | STEPS


def _with_picture(index: int) -> dict[str, Any]:
    return prompt(index) | {"image": parts.picture(index)}


# -- text to picture -------------------------------------------------------------------------------------------


@row("sd15, its own timesteps")
def _() -> Any:
    pipe = StableDiffusionPipeline(**parts.stable_diffusion(scheduler=EulerDiscreteScheduler(steps_offset=1)))
    return pipe, three(prompt, timesteps=[900, 500, 100], **SIZE)


@row("sd15, its own sigmas")
def _() -> Any:
    pipe = StableDiffusionPipeline(**parts.stable_diffusion(scheduler=EulerDiscreteScheduler(steps_offset=1)))
    return pipe, three(prompt, sigmas=[12.0, 3.0, 0.5], **SIZE)


@row("sd15, several prompts and pictures a call")
def _() -> Any:
    pipe = StableDiffusionPipeline(**parts.stable_diffusion())
    return pipe, three(lambda index: {"prompt": [PROMPTS[index], "a cat"]}, num_images_per_prompt=2, **DRAWN)


@row("sd15, prompt embeddings and steps that differ")
def _() -> Any:
    pipe = StableDiffusionPipeline(**parts.stable_diffusion())

    def call(index: int) -> dict[str, Any]:
        texts = {name: parts.noise(1, 40, TEXT_WIDTH, seed=index + seed) for name, seed in EMBEDDINGS}
        return texts | {"num_inference_steps": 2 + index % 2}

    return pipe, three(call, **SIZE)


EMBEDDINGS = (("prompt_embeds", 0), ("negative_prompt_embeds", 10))


@row("sd15, FreeU", is_saved_whole=False)
def _() -> Any:
    pipe = StableDiffusionPipeline(**parts.stable_diffusion())
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return pipe, three(prompt, **DRAWN)


@row("sd2, v-prediction")
def _() -> Any:
    unet = parts.unet(use_linear_projection=True, attention_head_dim=(8,))
    scheduler = EulerDiscreteScheduler(steps_offset=1, prediction_type="v_prediction")
    return StableDiffusionPipeline(**parts.stable_diffusion(unet=unet, scheduler=scheduler)), three(prompt, **DRAWN)


@row("sd turbo, 1 step")
def _() -> Any:
    pipe = StableDiffusionPipeline(**parts.stable_diffusion(scheduler=EulerDiscreteScheduler(steps_offset=1)))
    return pipe, three(prompt, num_inference_steps=1, guidance_scale=0.0, **SIZE)


@row("lcm, 4 steps")
def _() -> Any:
    unet = parts.unet(time_cond_proj_dim=16)
    pipe = diffusers.LatentConsistencyModelPipeline(
        **parts.stable_diffusion(unet=unet, scheduler=LCMScheduler(original_inference_steps=50))
    )
    return pipe, three(prompt, num_inference_steps=4, **SIZE)


@row("pag")
def _() -> Any:
    pipe = diffusers.StableDiffusionPAGPipeline(**parts.stable_diffusion(), pag_applied_layers=["mid"])
    return pipe, three(prompt, pag_scale=3.0, **DRAWN)


@row("pag sdxl")
def _() -> Any:
    pipe = diffusers.StableDiffusionXLPAGPipeline(**parts.stable_diffusion_xl(), pag_applied_layers=["mid"])
    return pipe, three(prompt, pag_scale=3.0, **DRAWN)


@row("gligen")
def _() -> Any:
    unet = parts.filled(parts.unet(attention_type="gated", cross_attention_dim=TEXT_WIDTH))
    pipe = diffusers.StableDiffusionGLIGENPipeline(**parts.stable_diffusion(unet=unet))
    boxes = {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.9]], "gligen_scheduled_sampling_beta": 0.5}
    return pipe, three(prompt, **boxes, **DRAWN)


@row("sdxl")
def _() -> Any:
    return StableDiffusionXLPipeline(**parts.stable_diffusion_xl()), three(prompt, **DRAWN)


@row("sdxl turbo, 1 step")
def _() -> Any:
    pipe = StableDiffusionXLPipeline(**parts.stable_diffusion_xl(scheduler=EulerDiscreteScheduler(steps_offset=1)))
    return pipe, three(prompt, num_inference_steps=1, guidance_scale=0.0, **SIZE)


@row("sdxl refiner")
def _() -> Any:
    unet = parts.xl_unet(projection_class_embeddings_input_dim=5 * 8 + TEXT_WIDTH, cross_attention_dim=TEXT_WIDTH)
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts.stable_diffusion_xl(unet=unet, text_encoder=None, tokenizer=None), requires_aesthetics_score=True
    )

    def call(index: int) -> dict[str, Any]:
        return prompt(index) | {"image": parts.noise(1, 4, 8, 8, seed=index)}

    return pipe, three(call, num_inference_steps=4, denoising_start=0.5)


# -- with a picture --------------------------------------------------------------------------------------------


@row("img2img")
def _() -> Any:
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts.stable_diffusion())
    return pipe, three(_with_picture, strength=0.75, num_inference_steps=4)


@row("sdxl img2img")
def _() -> Any:
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts.stable_diffusion_xl())
    return pipe, three(_with_picture, strength=0.5, num_inference_steps=4)


@row("inpaint, 4 channels")
def _() -> Any:
    pipe = diffusers.StableDiffusionInpaintPipeline(**parts.stable_diffusion())
    return pipe, three(_with_picture, mask_image=parts.mask(), **DRAWN)


@row("inpaint, 9 channels")
def _() -> Any:
    pipe = diffusers.StableDiffusionInpaintPipeline(**parts.stable_diffusion(unet=parts.unet(in_channels=9)))
    return pipe, three(_with_picture, mask_image=parts.mask(), **DRAWN)


@row("sdxl inpaint, 9 channels")
def _() -> Any:
    given = parts.stable_diffusion_xl(unet=parts.xl_unet(in_channels=9))
    pipe = diffusers.StableDiffusionXLInpaintPipeline(**given)
    return pipe, three(_with_picture, mask_image=parts.mask(), strength=0.9, num_inference_steps=4, **SIZE)


@row("sdxl instruct-pix2pix")
def _() -> Any:
    given = parts.stable_diffusion_xl(unet=parts.xl_unet(in_channels=8))
    pipe = diffusers.StableDiffusionXLInstructPix2PixPipeline(**given)
    return pipe, three(_with_picture, image_guidance_scale=1.5, **DRAWN)


@row("instruct-pix2pix")
def _() -> Any:
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**parts.stable_diffusion(unet=parts.unet(in_channels=8)))
    return pipe, three(_with_picture, image_guidance_scale=1.5, **STEPS)


@row("depth2img")
def _() -> Any:
    given = parts.stable_diffusion(unet=parts.unet(in_channels=5))
    own = {name: given[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = diffusers.StableDiffusionDepth2ImgPipeline(**own, depth_estimator=None, feature_extractor=None)

    def call(index: int) -> dict[str, Any]:
        return _with_picture(index) | {"depth_map": parts.noise(1, parts.PIXELS, parts.PIXELS, seed=index)}

    return pipe, three(call, strength=0.75, num_inference_steps=4)


@row("upscale x4")
def _() -> Any:
    unet = parts.unet(in_channels=7, num_class_embeds=1000)
    given = parts.stable_diffusion(unet=unet)
    own = {name: given[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = diffusers.StableDiffusionUpscalePipeline(**own, low_res_scheduler=DDPMScheduler())
    return pipe, three(lambda index: prompt(index) | {"image": parts.picture(index, 8)}, **STEPS)


@row("latent upscale x2", is_large=True)
def _() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=[32, 32, 64, 64],
        time_cond_proj_dim=160,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        in_channels=8,
        mid_block_type=None,
        only_cross_attention=False,
        out_channels=5,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    ).eval()
    given = parts.stable_diffusion(unet=unet, scheduler=EulerDiscreteScheduler(prediction_type="sample"))
    own = {name: given[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = diffusers.StableDiffusionLatentUpscalePipeline(**own)
    return pipe, three(lambda index: prompt(index) | {"image": parts.noise(1, 3, 16, 16, seed=index)}, **STEPS)


@row("image variation")
def _() -> Any:
    given = parts.stable_diffusion(feature_extractor=parts.feature_extractor())
    del given["text_encoder"], given["tokenizer"]
    pipe = diffusers.StableDiffusionImageVariationPipeline(**given, image_encoder=parts.image_encoder())
    return pipe, three(lambda index: {"image": parts.picture(index)}, **DRAWN)


# -- with conditions and adapters ----------------------------------------------------------------------------------


@row("controlnet")
def _() -> Any:
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts.stable_diffusion(), controlnet=parts.controlnet())
    return pipe, three(_with_picture, **DRAWN)


@row("controlnet, two nets, each for some of the steps")
def _() -> Any:
    nets = [parts.controlnet(), parts.controlnet()]
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts.stable_diffusion(), controlnet=nets)

    def call(index: int) -> dict[str, Any]:
        return prompt(index) | {"image": [parts.picture(index), parts.picture(index + 3)]}

    return pipe, three(call, control_guidance_end=[0.5, 1.0], **DRAWN)


@row("controlnet img2img")
def _() -> Any:
    pipe = diffusers.StableDiffusionControlNetImg2ImgPipeline(**parts.stable_diffusion(), controlnet=parts.controlnet())

    def call(index: int) -> dict[str, Any]:
        return _with_picture(index) | {"control_image": parts.picture(index + 3)}

    return pipe, three(call, strength=0.75, num_inference_steps=4)


@row("controlnet inpaint")
def _() -> Any:
    pipe = diffusers.StableDiffusionControlNetInpaintPipeline(**parts.stable_diffusion(), controlnet=parts.controlnet())

    def call(index: int) -> dict[str, Any]:
        return _with_picture(index) | {"control_image": parts.picture(index + 3), "mask_image": parts.mask()}

    return pipe, three(call, **DRAWN)


@row("controlnet sdxl")
def _() -> Any:
    net = parts.controlnet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
    )
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**parts.stable_diffusion_xl(), controlnet=net)
    return pipe, three(_with_picture, **DRAWN)


@row("controlnet union sdxl")
def _() -> Any:
    torch.manual_seed(5)
    net = diffusers.ControlNetUnionModel(
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        layers_per_block=1,
        cross_attention_dim=2 * TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
        num_control_type=6,
        num_trans_channel=32,
        num_trans_head=4,
        num_trans_layer=1,
        num_proj_channel=32,
    )
    pipe = diffusers.StableDiffusionXLControlNetUnionPipeline(
        **parts.stable_diffusion_xl(), controlnet=parts.filled(net.eval())
    )

    def call(index: int) -> dict[str, Any]:
        return prompt(index) | {"control_image": [parts.picture(index)], "control_mode": [3]}

    return pipe, three(call, **DRAWN)


@row("t2i-adapter")
def _() -> Any:
    pipe = diffusers.StableDiffusionAdapterPipeline(
        **parts.stable_diffusion(), adapter=parts.t2i_adapter("full_adapter")
    )
    return pipe, three(_with_picture, **DRAWN)


@row("t2i-adapter sdxl")
def _() -> Any:
    given = parts.stable_diffusion_xl()
    del given["add_watermarker"]
    pipe = diffusers.StableDiffusionXLAdapterPipeline(**given, adapter=parts.t2i_adapter("full_adapter_xl"))
    return pipe, three(_with_picture, **DRAWN)


@row("ip-adapter", is_saved_whole=False)
def _() -> Any:
    pipe = StableDiffusionPipeline(**parts.stable_diffusion())
    parts.add_ip_adapter(pipe.unet)

    def call(index: int) -> dict[str, Any]:
        return prompt(index) | {"ip_adapter_image_embeds": [parts.noise(2, 1, TEXT_WIDTH, seed=index)]}

    return pipe, three(call, **DRAWN)


@row("ip-adapter sdxl", is_saved_whole=False)
def _() -> Any:
    pipe = StableDiffusionXLPipeline(**parts.stable_diffusion_xl())
    parts.add_ip_adapter(pipe.unet, 2 * TEXT_WIDTH)

    def call(index: int) -> dict[str, Any]:
        return prompt(index) | {"ip_adapter_image_embeds": [parts.noise(2, 1, TEXT_WIDTH, seed=index)]}

    return pipe, three(call, **DRAWN)
