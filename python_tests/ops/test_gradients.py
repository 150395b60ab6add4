"""Gradients pass through weights-only layers as in float; where activations are rounded they are refused in words."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ldmq_kernels import ops
from ldmq_kernels.conversion import quantize
from ldmq_kernels.kernels.dispatch import dispatch_report, reset_dispatch_report
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.ops import specs
from ldmq_kernels.ops.operands import Shape, example
from python_tests.nn.layers import dequantized_weight, quantized
from python_tests.tiny import SHALLOW, tiny_unet, unet_inputs

ROUNDING = [name for name, spec in specs().items() if spec.rounds]
WEIGHTS_ONLY = [name for name, scheme in SCHEMES.items() if scheme.quantizes and not scheme.quantizes_activations]
REFUSED = r"rounds and has no backward pass.*torch\.no_grad\(\)"


def operands(op: str) -> list[Any]:
    shape = Shape(tokens=3, channels=8, out=4, picture=(1, 3, 3), options=specs()[op].optional | {"inv_scale"})
    return list(example(op, shape, torch.device("cpu"), torch.float32))


def test_the_ops_that_have_gradients_are_those_of_floating_activations() -> None:
    assert set(specs()) - set(ROUNDING) == {"linear_w8a16", "linear_w4a16", "conv2d_w8a16"}


@pytest.mark.parametrize("op", ROUNDING)
def test_an_op_that_rounds_refuses_an_activation_that_requires_gradients(op: str) -> None:
    call = getattr(ops, op)
    for index, name in enumerate(specs()[op].arguments):
        arguments = operands(op)
        if index not in specs()[op].floating or arguments[index] is None:
            continue
        with torch.no_grad():
            wanted = call(*arguments)
        arguments[index].requires_grad_()
        with torch.no_grad():
            torch.testing.assert_close(call(*arguments), wanted, rtol=0, atol=0)
        if name == "bias":
            out = call(*arguments)
            assert torch.equal(out, wanted)
            with pytest.raises(RuntimeError, match=f"ldmq::{op} {REFUSED}"):
                out.sum().backward()
        else:
            with pytest.raises(RuntimeError, match=f"ldmq::{op} {REFUSED}"):
                call(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "pointwise"])
@pytest.mark.parametrize("scheme", WEIGHTS_ONLY)
def test_a_weights_only_layer_has_the_gradients_of_the_weight_that_it_stores(
    scheme: str, kind: str, dtype: torch.dtype
) -> None:
    if kind != "linear" and "conv2d" not in SCHEMES[scheme].format.layers:
        pytest.skip(f"there is no {scheme} convolution")
    torch.manual_seed(0)
    made = {"linear": nn.Linear(70, 9), "conv2d": nn.Conv2d(6, 9, 3, 2, 1), "pointwise": nn.Conv2d(6, 9, 1)}[kind]
    layer = quantized(made, scheme).to(dtype)
    exact = (nn.Linear(70, 9) if kind == "linear" else made).double()
    weight = dequantized_weight(layer)
    exact.weight = nn.Parameter(weight if kind == "linear" else weight.permute(0, 3, 1, 2))
    exact.bias = nn.Parameter(layer.bias.detach().double())
    layer.bias = nn.Parameter(layer.bias.detach())
    x = torch.randn((5, 70) if kind == "linear" else (2, 6, 7, 8)).to(dtype).requires_grad_()
    x_exact = x.detach().double().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x).sin().sum().backward()
    exact(x_exact).sin().sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    for found, wanted in ((x.grad, x_exact.grad), (layer.bias.grad, exact.bias.grad)):
        difference = (found.double() - wanted).norm() / wanted.norm()
        assert difference < tolerance


def test_a_differentiated_call_is_computed_by_the_definition() -> None:
    layer = quantized(nn.Linear(8, 4).requires_grad_(False), "w8a16")
    reset_dispatch_report()
    assert layer(torch.ones(2, 8, requires_grad=True)).requires_grad
    assert dispatch_report().split()[:2] == ["linear_w8a16", "reference"]


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a8-dynamic", "w8a16", "w4a16"])
def test_gradients_of_latents_are_right_or_refused_and_calls_without_them_need_no_guard(scheme: str) -> None:
    unet, inputs = tiny_unet(**SHALLOW), unet_inputs()
    exact = inputs["sample"].clone().requires_grad_()
    unet(**(inputs | {"sample": exact})).sample.square().mean().backward()
    quantize(unet, scheme=scheme)
    out = unet(**inputs).sample  # in grad mode
    assert not out.requires_grad
    latents = inputs["sample"].clone().requires_grad_()
    if SCHEMES[scheme].quantizes_activations:
        with pytest.raises(RuntimeError, match=REFUSED):
            unet(**(inputs | {"sample": latents}))
    else:
        unet(**(inputs | {"sample": latents})).sample.square().mean().backward()
        assert torch.cosine_similarity(latents.grad.flatten(), exact.grad.flatten(), dim=0) > 0.9


@pytest.mark.parametrize(("scheme", "text"), [("w8a8-dynamic", "no backward pass"), ("w8a16", "eager mode only")])
def test_a_compiled_layer_refuses_gradients(scheme: str, text: str) -> None:
    torch._dynamo.reset()
    layer = torch.compile(quantized(nn.Linear(8, 4).requires_grad_(False), scheme), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8)
    assert not layer(x).requires_grad
    with pytest.raises(Exception, match=text):
        layer(x.requires_grad_())
