"""Small quantized UNets on a device, and calls of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.conversion import convert
from ldmq_kernels.integrations.diffusers.fused import PLAIN
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan, model_record
from python_tests.tiny import TEXT_WIDTH, TOKENS, mixed_plan, tiny_unet

SCHEMES = ("w8a8-dynamic", "w8a8-static", "w4a8-dynamic", "mixed")


def on_device(scheme: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A UNet of one scheme, or of all in turn, converted on the CPU and moved."""
    unet = tiny_unet()
    plan = mixed_plan(unet) if scheme == "mixed" else Plan(model_record(unet), [{"pattern": "*", "scheme": scheme}])
    if scheme.endswith("static"):
        plan.input_scales.update(dict.fromkeys(quantizable_layers(unet), 0.03))
    convert(unet, plan)
    return unet.to(device=device, dtype=dtype)


def inputs(
    device: torch.device, dtype: torch.dtype, batch: int = 2, size: int = 8, timestep: int = 321
) -> dict[str, Any]:
    """Arguments of a call, on the device."""
    generator = torch.Generator().manual_seed(timestep)
    return {
        "sample": torch.randn(batch, 4, size, size, generator=generator).to(device, dtype),
        "timestep": torch.tensor(timestep, device=device),
        "encoder_hidden_states": torch.randn(batch, TOKENS, TEXT_WIDTH, generator=generator).to(device, dtype),
    }


def output(unet: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The UNet's output for these arguments, without gradients."""
    with torch.no_grad():
        return unet(**arguments, return_dict=False)[0]


def first(out: Any) -> Tensor:
    """What a block returns, or the first of it."""
    return out if isinstance(out, Tensor) else out[0]


def calls_of_blocks(unet: nn.Module, arguments: dict[str, Any]) -> list[tuple[str, nn.Module, tuple, dict[str, Any]]]:
    """The name, the block and the arguments of each call of a fused block while the UNet runs."""
    calls: list[tuple[str, nn.Module, tuple, dict[str, Any]]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda block, args, kwargs, name=name: calls.append((name, block, args, kwargs)), with_kwargs=True
        )
        for name, module in unet.named_modules()
        if type(module) in PLAIN
    ]
    output(unet, arguments)
    for hook in hooks:
        hook.remove()
    return calls
