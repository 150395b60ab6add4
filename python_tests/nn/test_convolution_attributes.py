"""Attributes of nn.Conv2d that users write, before and after quantizing: `_conv_forward`, padding, dilation, stride."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldmq_kernels.integrations.diffusers.fused.eligibility import takes_quantized
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.nn.layers import quantized

SCHEMES = ["w8a16", "w8a8-dynamic"]
SET = {
    "padding": {"padding": (2, 1)},
    "padding as one number": {"padding": 2},
    "no padding": {"padding": "valid"},
    "same": {"padding": "same", "dilation": (2, 1)},
    "dilation": {"dilation": (2, 3), "padding": (2, 3)},
    "dilation as one number": {"dilation": 2},
    "stride": {"stride": 2},
    "tiled": {"padding_mode": "circular"},
    "tiled along one axis": {"padding_mode": "circular", "_reversed_padding_repeated_twice": [1, 1, 0, 0]},
}


def tiled(self, x, weight, bias):
    """Circular along the width, zeros along the height."""
    x = nn.functional.pad(nn.functional.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
    return nn.functional.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)


def convolution(kernel_size: int = 3) -> tuple[nn.Conv2d, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Conv2d(16, 8, kernel_size, padding=kernel_size // 2), torch.randn(2, 16, 9, 7)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("case", SET)
def test_what_is_set_counts(case: str, before: bool, scheme: str) -> None:
    layer, x = convolution()
    made = None if before else quantized(layer, scheme)
    for name, value in SET[case].items():
        setattr(layer, name, value)
        if made is not None:
            setattr(made, name, value)
    made = quantized(layer, scheme) if made is None else made
    with torch.no_grad():
        assert sqnr_db(layer(x), made(x)) > 35


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_pointwise_layer_that_is_given_padding_is_one_no_more(scheme: str) -> None:
    layer, x = convolution(1)
    made = quantized(layer, scheme)
    for each in (layer, made):
        each.padding, each.stride = 1, (2, 1)
    assert not made.is_pointwise
    with torch.no_grad():
        assert sqnr_db(layer(x), made(x)) > 35


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_convolution_that_is_put_in_later_is_called_with_the_float_weight(scheme: str) -> None:
    layer, x = convolution()
    made = quantized(layer, scheme)
    plain = made(x)
    for each in (layer, made):
        each._conv_forward = tiled.__get__(each, type(each))
    assert not takes_quantized(made)
    with torch.no_grad():
        assert sqnr_db(layer(x), made(x)) > 35
        assert sqnr_db(layer(x), plain) < 20
    del made._conv_forward
    assert torch.equal(made(x), plain)


def test_one_that_is_put_into_every_convolution_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = convolution()
    made = quantized(layer, "w8a8-dynamic")
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", tiled)
    with torch.no_grad():
        assert sqnr_db(layer(x), made(x)) > 35


def test_a_padding_mode_that_every_new_convolution_is_given_is_that_of_the_float_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As seamless tiling does it: nn.Conv2d.__init__ adds the argument, also to those that are made with one."""
    layer, x = convolution()
    init = nn.Conv2d.__init__
    monkeypatch.setattr(
        nn.Conv2d, "__init__", lambda self, *args, **kwargs: init(self, *args, **kwargs, padding_mode="circular")
    )
    circular = nn.Conv2d(16, 8, 3, padding=1)
    with torch.no_grad():
        for each in (layer, circular):
            assert sqnr_db(each(x), quantized(each, "w8a8-dynamic")(x)) > 35
