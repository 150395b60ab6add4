"""Other parts of pipelines than denoisers: autoencoders, and the nets that steer."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from python_tests.breadth import image_rows, other_rows, parts
from python_tests.breadth.rows import ROWS, Row, prompt, row, three

PARTS = {  # row -> the row whose pipeline and calls it has, and the part of that
    "sdxl, the vae": ("sdxl", "vae"),
    "img2img, the vae, which encodes too": ("img2img", "vae"),
    "stable video diffusion, the vae": ("stable video diffusion", "vae"),
    "wan, the vae": ("wan 2.2, the first transformer", "vae"),
    "controlnet, the net": ("controlnet", "controlnet"),
    "controlnet, the second of two nets": ("controlnet, two nets, each for some of the steps", "controlnet.nets.1"),
    "controlnet union sdxl, the net": ("controlnet union sdxl", "controlnet"),
    "t2i-adapter, the adapter": ("t2i-adapter", "adapter"),
    "t2i-adapter sdxl, the adapter": ("t2i-adapter sdxl", "adapter"),
}

assert image_rows, other_rows
ROWS.update({name: Row(name, ROWS[of].build, part, ROWS[of].is_large) for name, (of, part) in PARTS.items()})


# in float, too, this one comes back from disk with other numbers: diffusers saves not all that it is made from
@row("controlnet-xs", is_large=True, is_saved_whole=False)
def _() -> Any:
    torch.manual_seed(5)
    unet = parts.tiny_unet(norm_num_groups=4, layers_per_block=2)
    net = diffusers.ControlNetXSAdapter.from_unet(
        unet, size_ratio=1, learn_time_embedding=True, conditioning_embedding_out_channels=(8, 16)
    )
    given = parts.stable_diffusion(unet=unet)
    pipe = diffusers.StableDiffusionControlNetXSPipeline(**given, controlnet=parts.filled(net.eval()))
    return pipe, three(
        lambda index: prompt(index) | {"image": parts.picture(index)},
        num_inference_steps=2,
        height=parts.PIXELS,
        width=parts.PIXELS,
    )
