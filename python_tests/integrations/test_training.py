"""An adapter, or the latents, are optimized on a quantized UNet as on the float one, through fused blocks too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ldmq_kernels.conversion import quantize
from python_tests.integrations import transformers
from python_tests.tiny import SHALLOW, mixed_plan, run_unet, same_bits, tiny_unet, unet_inputs

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a8-dynamic", "w8a16", "w4a16"])
def test_the_latents_of_a_fused_unet_have_them_and_calls_without_build_no_graph(scheme: str) -> None:
    unet, inputs = tiny_unet(**SHALLOW), unet_inputs()
    exact = inputs["sample"].clone().requires_grad_()
    unet(**(inputs | {"sample": exact})).sample.square().mean().backward()
    quantize(unet, scheme=scheme)
    assert not unet(**inputs).sample.requires_grad  # in grad mode
    latents = inputs["sample"].clone().requires_grad_()
    unet(**(inputs | {"sample": latents})).sample.square().mean().backward()
    assert torch.cosine_similarity(latents.grad.flatten(), exact.grad.flatten(), dim=0) > 0.9


def trained(unet: nn.Module, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of training a LoRA, and its first gradients."""
    torch.manual_seed(1)
    unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1", "proj_in", "ff.net.2"]))
    adapter = {name: p for name, p in unet.named_parameters() if "lora_" in name}
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    target = torch.randn(2, 4, 8, 8, generator=generator)
    optimizer = torch.optim.Adam(adapter.values(), lr=3e-3)
    losses, first = [], {}
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (unet(**unet_inputs()).sample - target).square().mean()
        loss.backward()
        first = first or {name: p.grad.clone() for name, p in adapter.items()}
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, first


@functools.cache
def float_training() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of the same adapter on the float UNet."""
    return trained(tiny_unet(), 4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_trains_on_a_quantized_unet_as_on_the_float_one(checkpointing: bool) -> None:
    quantized_unet = tiny_unet()
    quantize(quantized_unet, scheme="w8a8-dynamic")
    integers = {name: t.clone() for name, t in quantized_unet.state_dict().items()}
    if checkpointing:
        quantized_unet.enable_gradient_checkpointing()
        quantized_unet.train()
    losses, gradients = trained(quantized_unet, 4)
    exact_losses, exact = float_training()
    assert len(gradients) == len(exact) > 20
    for name, gradient in exact.items():
        assert torch.cosine_similarity(gradient.flatten(), gradients[name].flatten(), dim=0) > 0.97, name
    assert losses[-1] < 0.8 * losses[0]
    assert abs(losses[-1] / exact_losses[-1] - 1) < 0.1
    after = {name.replace(".base_layer", ""): t for name, t in quantized_unet.state_dict().items()}
    assert all(same_bits(after[name], tensor) for name, tensor in integers.items())


def test_a_lora_has_gradients_on_layers_of_every_scheme() -> None:
    unet = tiny_unet()
    quantize(unet, mixed_plan(unet))
    before = run_unet(unet)
    _, gradients = trained(unet, 1)
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in gradients.values())
    unet.delete_adapters("default")
    assert torch.equal(run_unet(unet), before)


@pytest.mark.parametrize("build", [transformers.flux, transformers.wan, transformers.pixart])
def test_a_lora_on_a_fused_transformer_has_the_gradients_of_the_float_one(build: Callable[[], Any]) -> None:
    gradients = []
    for is_quantized in (False, True):
        model, call = build()
        if is_quantized:
            quantize(model, scheme="w8a8-dynamic")
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["to_q", "to_out.0", "net.2", "proj_mlp"])
        peft.inject_adapter_in_model(config, model)
        generator = torch.Generator().manual_seed(2)
        adapter = {name: p for name, p in model.named_parameters() if "lora_" in name}
        for parameter in adapter.values():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        model(**call, return_dict=False)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in adapter.items()})
    exact, found = gradients
    assert len(exact) == len(found) > 3
    for name, gradient in exact.items():
        assert torch.cosine_similarity(gradient.flatten(), found[name].flatten(), dim=0) > 0.97, name
