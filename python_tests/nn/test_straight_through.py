"""Gradients of quantized layers are those of the float layer with the dequantized weight, in every scheme."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ldmq_kernels.nn import QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.layers import refusal
from python_tests.nn.layers import dequantized_weight, quantized

QUANTIZING = [name for name, scheme in SCHEMES.items() if scheme.quantizes]
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(70, 9), (5, 70)),
    "one row": (lambda: nn.Linear(70, 9), (70,)),
    "convolution": (lambda: nn.Conv2d(6, 9, 3, (2, 1), 1), (2, 6, 7, 8)),
    "unbatched": (lambda: nn.Conv2d(6, 9, 3, padding=1), (6, 7, 8)),
    "pointwise": (lambda: nn.Conv2d(6, 9, 1, bias=False), (2, 6, 3, 4)),
    "same": (lambda: nn.Conv2d(6, 9, (2, 4), padding="same", dilation=(1, 2)), (2, 6, 7, 8)),
    "circular": (lambda: nn.Conv2d(6, 9, 3, padding=1, padding_mode="circular"), (2, 6, 7, 8)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3), (2, 6, 7, 8)),
}


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("scheme", QUANTIZING)
def test_they_are_those_of_the_weight_that_it_stores(scheme: str, kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    made = make()
    if reason := refusal(made, SCHEMES[scheme]):
        pytest.skip(reason)
    layer = quantized(made, scheme, smooth=kind != "grouped" and SCHEMES[scheme].quantizes_activations)
    exact = made.double()
    weight = layer.from_channels_last(layer.real_weight()).double()
    if not SCHEMES[scheme].quantizes_activations:
        assert torch.allclose(weight, layer.from_channels_last(dequantized_weight(layer)))
    exact.weight = nn.Parameter(weight)
    x = torch.randn(shape).requires_grad_()
    x_exact = x.detach().double().requires_grad_()
    if made.bias is not None:
        exact.bias = nn.Parameter(layer.bias.detach().double())
        layer.bias = nn.Parameter(layer.bias.detach())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd")  # torch, of an op without a backward pass
        out = layer(x)
    with torch.no_grad():
        assert torch.equal(out, layer(x))
    wanted = exact(x_exact)
    direction = torch.randn(out.shape)
    (out * direction).sum().backward()
    (wanted * direction).sum().backward()
    assert difference(x.grad, x_exact.grad) < 1e-5
    if made.bias is not None:
        assert difference(layer.bias.grad, exact.bias.grad) < 1e-5


def test_they_are_computed_in_the_dtype_of_the_input() -> None:
    layer = quantized(nn.Linear(70, 9), "w8a8-dynamic").to(torch.bfloat16)
    x = torch.randn(5, 70, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert difference(x.grad, layer.real_weight().double().sum(0).expand(5, 70)) < 0.01


def test_gradients_of_gradients_are_those_of_a_linear() -> None:
    layer = quantized(nn.Linear(8, 4).requires_grad_(False), "w8a8-dynamic")
    x = torch.randn(2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()
    weight = layer.real_weight()
    assert difference(x.grad, (2 * weight.T @ weight).sum(0).double().expand(2, 8)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a16"])
def test_they_compile(scheme: str) -> None:
    torch._dynamo.reset()
    layer = quantized(nn.Linear(8, 4).requires_grad_(False), scheme)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8)
    assert not compiled(x).requires_grad
    x.requires_grad_()
    compiled(x).sum().backward()
    assert difference(x.grad, layer.real_weight().sum(0).double().expand(2, 8)) < 1e-5
    assert isinstance(layer, QuantLinear)
