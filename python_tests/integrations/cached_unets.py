"""Tiny UNets for tests of the step cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmq_kernels.conversion import convert
from ldmq_kernels.integrations.diffusers.fused import fuse
from ldmq_kernels.nn import QuantLinear
from ldmq_kernels.plans.plan import uniform_plan
from python_tests.tiny import mixed_plan, tiny_unet, unet_inputs

SCHEMES = ("float", "w8a8-dynamic", "w4a8-dynamic", "w8a16", "w4a16", "mixed")
STEPS = [7, 321, 17.25, 998.6]
RESNET = "mid_block.resnets.0"


def made(scheme: str = "w8a8-dynamic", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny UNet with fused blocks."""
    unet = tiny_unet(**changes)
    if scheme == "float":
        fuse(unet)
    else:
        convert(unet, mixed_plan(unet) if scheme == "mixed" else uniform_plan(unet, scheme))
    return unet.to(dtype)


def run(unet: nn.Module, timestep: Any = 321, batch: int = 2) -> Tensor:
    dtype = unet.conv_in.bias.dtype
    arguments = {**unet_inputs(dtype, batch), "timestep": timestep}
    with torch.no_grad():
        return unet(**arguments, return_dict=False)[0]


def layer_calls(unet: nn.Module, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many linears of the time embedding and of its projections are computed while `call` runs."""
    resnets = [module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D"]
    layers = {unet.time_embedding.linear_1, unet.time_embedding.linear_2, *(r.time_emb_proj for r in resnets)}
    calls: list[Any] = []
    with monkeypatch.context() as patch:
        for kind, name in ((nn.Linear, "forward"), (QuantLinear, "forward"), (QuantLinear, "linear")):
            real = getattr(kind, name)

            def counted(self: Any, *args: Any, real: Any = real, **kwargs: Any) -> Any:
                calls.extend([self] if self in layers else [])
                return real(self, *args, **kwargs)

            patch.setattr(kind, name, counted)
        call()
    return len(set(calls))
