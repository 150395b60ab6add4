"""What the modules of a diffusers UNet are called in the original latent diffusion code, which ComfyUI keeps to."""

from __future__ import annotations

from typing import Any

BEGINNING = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _places(unet: Any) -> dict[str, str]:
    """Where blocks and their samplers go: the prefixes of diffusers, with those of the original."""
    found: dict[str, str] = {}
    place = 1  # of input_blocks; 0 is conv_in
    for index, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            found[f"down_blocks.{index}.resnets.{layer}"] = f"input_blocks.{place}.0"
            found[f"down_blocks.{index}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        if block.downsamplers:
            found[f"down_blocks.{index}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    found |= {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    place = 0
    for index, block in enumerate(unet.up_blocks):
        attends = bool(getattr(block, "attentions", None))
        for layer in range(len(block.resnets)):
            found[f"up_blocks.{index}.resnets.{layer}"] = f"output_blocks.{place}.0"
            found[f"up_blocks.{index}.attentions.{layer}"] = f"output_blocks.{place}.1"
            place += 1
        if block.upsamplers:
            sampler = f"output_blocks.{place - 1}.{2 if attends else 1}.conv"
            found[f"up_blocks.{index}.upsamplers.0.conv"] = sampler
    return found


def ldm_names(unet: Any) -> dict[str, str]:
    """The original name of each module of a UNet that has tensors of its own.

    Args:
        unet: a `UNet2DConditionModel`, float or quantized.

    Returns:
        "down_blocks.0.resnets.0.conv1" -> "input_blocks.1.0.in_layers.2", and so on.

    Raises:
        ValueError: the UNet has a module that the original code has not, such as those of GLIGEN.
    """
    places = _places(unet)
    found: dict[str, str] = {}
    for name, module in unet.named_modules():
        own = {**module._parameters, **module._buffers}
        if any(tensor is not None for tensor in own.values()):
            found[name] = _original(name, places)
    return found


def _original(name: str, places: dict[str, str]) -> str:
    if name in BEGINNING:
        return BEGINNING[name]
    if name in places:
        return places[name]
    prefix = next((prefix for prefix in places if name.startswith(f"{prefix}.")), None)
    if prefix is not None:
        rest = name.removeprefix(f"{prefix}.")
        if ".attentions." in prefix:
            return f"{places[prefix]}.{rest}"
        if rest in RESNET:
            return f"{places[prefix]}.{RESNET[rest]}"
    raise ValueError(f"{name} has no place in the original UNet of latent diffusion: ComfyUI has no such layer")
