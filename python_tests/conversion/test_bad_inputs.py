"""What cannot be planned or quantized is refused in words, before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel

import ldmq_kernels as ldmq
from ldmq_kernels.plans.plan import PlanError, uniform_plan
from python_tests.tiny import PROMPTS, run_unet, tiny_unet

SETTINGS: dict[str, Any] = {"target_sqnr_db": 20, "num_inference_steps": 1}


class WithoutDenoiser:
    """A pipeline that only decodes."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.components = {"vae": vae}


def of_another_family() -> Any:
    sizes = {"sample_size": 8, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    widths = {"joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32}
    return uniform_plan(SD3Transformer2DModel(**sizes, **widths), "w8a8-dynamic")


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no denoiser, quantized": (
        lambda pipe: ldmq.quantize(WithoutDenoiser(pipe.vae), scheme="w8a16"),
        TypeError,
        "WithoutDenoiser has neither a unet nor a transformer",
    ),
    "no denoiser, planned": (
        lambda pipe: ldmq.plan(WithoutDenoiser(pipe.vae), PROMPTS, **SETTINGS),
        TypeError,
        "WithoutDenoiser has neither a unet nor a transformer",
    ),
    "a size that the pipeline refuses": (
        lambda pipe: ldmq.plan(pipe, PROMPTS * 2, height=15, width=16, **SETTINGS),
        ValueError,
        "divisible by 8 but are 15 and 16",
    ),
    "a plan for another family": (
        lambda pipe: ldmq.quantize(pipe, of_another_family()),
        PlanError,
        "SD3Transformer2DModel",
    ),
    "a plan for other sizes": (
        lambda pipe: ldmq.quantize(pipe, uniform_plan(tiny_unet(cross_attention_dim=24), "w8a16")),
        PlanError,
        "UNet2DConditionModel",
    ),
    "an argument that the pipeline does not know": (
        lambda pipe: ldmq.plan(pipe, calls=[{"prompt": "a cat", "imagee": 1}] * 4, **SETTINGS),
        ValueError,
        r"calls\[0\]: StableDiffusionPipeline takes no 'imagee'",
    ),
    "a call without what the pipeline needs": (
        lambda pipe: ldmq.plan(pipe, calls=[{"num_inference_steps": 1}] * 4, **SETTINGS),
        ValueError,
        "prompt",
    ),
    "a scheme that nothing is called": (
        lambda pipe: ldmq.quantize(pipe, scheme="w7a7"),
        PlanError,
        "unknown scheme 'w7a7': choose one of",
    ),
}


@pytest.mark.parametrize("how", BAD)
def test_it_is_refused_and_the_model_is_as_it_was(how: str, shared_pipe: Any) -> None:
    act, error, text = BAD[how]
    unet = shared_pipe.unet
    before, modules = run_unet(unet), list(unet.named_modules())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for _, module in modules]
    with pytest.raises(error, match=text):
        act(shared_pipe)
    assert list(unet.named_modules()) == modules
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for _, module in modules] == hooks
    assert torch.equal(run_unet(unet), before)
    assert all(parameter.requires_grad for parameter in unet.parameters())
