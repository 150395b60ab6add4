"""What ComfyUI's own library computes from the int8 linears of `ldmq export --comfyui`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import nn

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.comfyui import export, ldm_names
from ldmq_kernels.integrations.comfyui.export import PREFIX
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.tiny import mixed_plan, run_unet, tiny_unet

kitchen = pytest.importorskip("comfy_kitchen", reason="`make test-servers` installs it")
LAYOUT = "TensorWiseINT8Layout"


def as_comfyui_loads(content: bytes) -> nn.Module:
    """A float UNet with the tensors of a file, its int8 linears as ComfyUI makes them of `comfy_quant`."""
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    tensors, unet = load(content), tiny_unet()
    for name, original in ldm_names(unet).items():
        module: Any = unet.get_submodule(name)
        place = f"{PREFIX}{original}."
        if module._parameters.get("bias") is not None:
            module.bias = nn.Parameter(tensors[place + "bias"], requires_grad=False)
        weight = tensors[place + "weight"]
        if place + "comfy_quant" in tensors:
            said = json.loads(tensors[place + "comfy_quant"].numpy().tobytes())
            assert said.pop("format") == "int8_tensorwise"
            params = get_layout_class(LAYOUT).Params(
                scale=tensors[place + "weight_scale"], orig_dtype=torch.float32, orig_shape=tuple(weight.shape)
            )
            weight = QuantizedTensor(weight, LAYOUT, params)
            if said.get("full_precision_matrix_mult"):
                weight = weight.dequantize()
        module.weight = nn.Parameter(weight, requires_grad=False)
    return unet


def test_a_dynamic_model_computes_the_same() -> None:
    unet = ldmq.quantize(tiny_unet(), scheme="w8a8-dynamic")
    loaded = as_comfyui_loads(export(unet).content)
    plain, quantized, there = run_unet(tiny_unet()), run_unet(unet), run_unet(loaded)
    assert sum(type(parameter.data).__name__ == "QuantizedTensor" for parameter in loaded.parameters()) > 20
    assert sqnr_db(plain, there) > sqnr_db(plain, quantized) - 0.5  # its convolutions take float inputs
    assert sqnr_db(plain, there) > 35


def test_each_int8_linear_is_this_package_s_dynamic_one() -> None:
    unet = ldmq.quantize(tiny_unet(), scheme="w8a8-dynamic")
    tensors, names = load(export(unet).content), ldm_names(unet)
    compared = 0
    for name, layer in unet.named_modules():
        if not isinstance(layer, ldmq.QuantLinear):
            continue
        place = f"{PREFIX}{names[name]}."
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(compared))
        there = kitchen.int8_linear(
            x, tensors[place + "weight"], tensors[place + "weight_scale"], tensors.get(place + "bias"), torch.float32
        )
        torch.testing.assert_close(there, layer(x), rtol=1e-5, atol=1e-5)
        compared += 1
    assert compared > 20


def test_what_it_has_no_format_for_has_the_same_values() -> None:
    unet = tiny_unet()
    ldmq.quantize(unet, mixed_plan(unet))
    loaded = as_comfyui_loads(export(unet).content)
    for name, layer in unet.named_modules():
        if isinstance(layer, ldmq.QuantConv2d):
            assert torch.equal(loaded.get_submodule(name).weight, layer.weight + 0), name
