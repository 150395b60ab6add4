"""PEFT's methods that read the weight under an adapter: on a quantized layer they do what they do on its float one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ldmq_kernels as ldmq
from ldmq_kernels.nn import QuantConv2d, QuantizedLayer, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.plan import uniform_plan
from python_tests.tiny import SHALLOW, run_unet, tiny_unet

peft = pytest.importorskip("peft")

LAYERS = ["linear", "convolution"]
TARGETS = {"OFT": ["linear"]}  # of a convolution its input grows by the overlap of windows, out of any calibrated range
METHODS = {
    "LoRA": (peft.LoraConfig, {"r": 4}),
    "rsLoRA": (peft.LoraConfig, {"r": 4, "use_rslora": True}),
    "DoRA": (peft.LoraConfig, {"r": 4, "use_dora": True}),
    "LoHa": (peft.LoHaConfig, {"r": 4}),
    "LoHa, effective": (peft.LoHaConfig, {"r": 4, "use_effective_conv2d": True}),
    "LoKr": (peft.LoKrConfig, {"r": 4}),
    "OFT": (peft.OFTConfig, {"oft_block_size": 4, "use_cayley_neumann": False}),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 4}),
    "IA3": (peft.IA3Config, {"feedforward_modules": []}),
}


class Two(nn.Module):
    """A convolution and a linear, in a branch of their own each."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(16, 20, 3, padding=1)
        self.linear = nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 16, H, W) to (N, 20, H, W)."""
        tokens = self.linear(x.flatten(2).mT).mT
        return self.convolution(x) + tokens.unflatten(2, x.shape[2:])


def adapted(model: nn.Module, method: str) -> nn.Module:
    """The model with an adapter whose parameters are random; the same ones in each call."""
    config, arguments = METHODS[method]
    torch.manual_seed(1)
    wrapped = peft.inject_adapter_in_model(
        config(target_modules=TARGETS.get(method, LAYERS), **arguments), model
    ).eval()
    generator = torch.Generator().manual_seed(2)
    marks = ("lora_A", "lora_B", "hada_", "lokr_", "oft_", "boft_", "ia3_")
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if any(mark in name for mark in marks):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def quantized_two(scheme: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Quantized; the float model of the same weights; an input."""
    torch.manual_seed(0)
    model, x = Two(), torch.randn(2, 16, 5, 5)
    scale = torch.tensor([0.03]) if SCHEMES[scheme].is_static else None
    made = Two()
    made.linear = QuantLinear.from_float(model.linear, SCHEMES[scheme], input_scale=scale)
    made.convolution = QuantConv2d.from_float(model.convolution, SCHEMES[scheme], input_scale=scale)
    if SCHEMES[scheme].format.name.startswith("w4"):  # compare with the float model of the rounded weights
        with torch.no_grad():
            model.linear.weight.copy_(made.linear.weight)
            model.convolution.weight.copy_(made.convolution.weight)
    return made, model, x


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-dynamic", "w8a8-static", "w8a8x2", "w4a8-dynamic"])
@pytest.mark.parametrize("method", METHODS)
def test_it_does_what_it_does_on_the_float_layer(method: str, scheme: str) -> None:
    made, model, x = quantized_two(scheme)
    with torch.no_grad():
        base, plain = model(x), made(x)
        exact = adapted(model, method)(x)
        assert sqnr_db(base, exact) < 30
        assert sqnr_db(exact, adapted(made, method)(x)) > sqnr_db(base, plain) - 3


@pytest.mark.parametrize("method", METHODS)
def test_it_does_so_on_int4_linears_of_16_bit_activations(method: str) -> None:
    torch.manual_seed(0)
    model, made, x = Two(), Two(), torch.randn(2, 16, 5, 5)
    made.linear = QuantLinear.from_float(model.linear, SCHEMES["w4a16"])
    with torch.no_grad():
        model.linear.weight.copy_(made.linear.weight)
        made.convolution = model.convolution
        exact, test = (adapted(copy.deepcopy(each), method)(x) for each in (model, made))
        assert sqnr_db(exact, test) > 60


def test_fused_projections_compute_what_the_single_ones_did() -> None:
    unet = tiny_unet(**SHALLOW)
    ldmq.quantize(unet, uniform_plan(unet, "w8a16"))
    before = run_unet(unet)
    with torch.no_grad():
        unet.fuse_qkv_projections()
    fused = run_unet(unet)
    assert sqnr_db(before, fused) > 80
    assert any(name.endswith("to_qkv") for name, _ in unet.named_modules())
    unet.unfuse_qkv_projections()
    assert torch.equal(run_unet(unet), before)
    assert any(isinstance(m, QuantizedLayer) for name, m in unet.named_modules() if name.endswith("to_q"))
