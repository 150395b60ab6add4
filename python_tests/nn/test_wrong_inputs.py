"""What no quantized layer takes is refused by each of them, with sizes and the layer's name, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ldmq_kernels import ops
from ldmq_kernels.conversion import quantize
from ldmq_kernels.kernels.dispatch import use_backend
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.numerics.formats.int4 import unpack_int4
from python_tests.nn.layers import quantized
from python_tests.tiny import SHALLOW, tiny_unet, unet_inputs

WIDTHS = (1, 8, 65, 67, 68, 132)  # one wide, narrow, one less and one more than 66, wide
QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.quantizes]
CONVOLVING = [name for name in QUANTIZED if "conv2d" in SCHEMES[name].format.layers]
SMOOTHED_TOO = [(name, smooth) for name in QUANTIZED for smooth in (False, SCHEMES[name].quantizes_activations)]


@pytest.mark.parametrize(("scheme", "smooth"), list(dict.fromkeys(SMOOTHED_TOO)))
def test_a_linear_takes_its_own_width_alone(scheme: str, smooth: bool) -> None:
    layer = quantized(nn.Linear(66, 20), scheme, smooth=smooth)
    layer.name = "block.to_k"
    for width in WIDTHS:
        with pytest.raises(ValueError, match=rf"block\.to_k \({scheme} linear\).*\(3, {width}\).*66 channels"):
            layer(torch.randn(3, width))
    assert layer(torch.randn(3, 66)).shape == (3, 20)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("scheme", CONVOLVING)
def test_a_convolution_takes_its_own_channels_alone(scheme: str, kernel: int) -> None:
    layer = quantized(nn.Conv2d(66, 20, kernel), scheme, smooth=SCHEMES[scheme].quantizes_activations)
    for channels in WIDTHS:
        for batch in ((), (2,)):
            shape = (*batch, channels, 3, 4)
            with pytest.raises(ValueError, match=rf"a layer \({scheme} conv2d\).*66 channels.*before height"):
                layer(torch.randn(shape))
    assert layer(torch.randn(66, 3, 4)).shape[0] == 20


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a16"])
def test_a_convolution_takes_a_picture_or_a_batch_of_them(scheme: str, kernel: int) -> None:
    layer = quantized(nn.Conv2d(8, 4, kernel), scheme)
    for shape in ((8,), (8, 5), (2, 3, 8, 5, 5)):
        with pytest.raises(ValueError, match=rf"a layer \({scheme} conv2d\) is given an input of shape"):
            layer(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_integers_and_eight_bit_floats_are_no_activations(scheme: str, dtype: torch.dtype) -> None:
    layer = quantized(nn.Linear(8, 4), scheme)
    with pytest.raises(ValueError, match=rf"{scheme} linear\) is given {dtype}, it takes float32.*cast"):
        layer(torch.ones(3, 8).to(dtype))
    if scheme in CONVOLVING:
        with pytest.raises(ValueError, match=f"is given {dtype}"):
            quantized(nn.Conv2d(8, 4, 3), scheme)(torch.ones(1, 8, 3, 3).to(dtype))


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a16", "w4a8-dynamic", "w4a16"])
def test_a_model_names_the_layer_that_is_given_narrow_text(scheme: str) -> None:
    unet = tiny_unet(**SHALLOW)
    quantize(unet, scheme=scheme)
    named = {name: layer.name for name, layer in unet.named_modules() if isinstance(layer, QuantizedLayer)}
    assert named
    assert all(name == told for name, told in named.items())
    inputs = unet_inputs()
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][..., :16]
    with torch.no_grad(), pytest.raises(ValueError, match=r"attn2\.to_k .*\(2, 40, 16\), and takes 32 channels"):
        unet(**inputs)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("quantize_static", (torch.ones(3, 1), torch.ones(8), -1)),
        ("quantize_static", (torch.ones(1, 1, 3, 3), torch.ones(8), 1)),
        ("quantize_per_token", (torch.ones(3, 1), torch.ones(8))),
        ("quantize_per_sample", (torch.ones(1, 1, 3, 3), torch.ones(8))),
        ("linear_w4a16", (torch.ones(3, 6), torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4, 1), None)),
    ],
)
def test_ops_refuse_sizes_that_do_not_belong_together(
    backend: str, op: str, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldmq_kernels.kernels.cpu.backend.serves", lambda device: True)
    with use_backend(backend), pytest.raises(ValueError, match=r"channels|do not hold"):
        getattr(ops, op)(*arguments)


def test_rows_of_int4_are_as_long_as_their_bytes() -> None:
    packed = torch.zeros(2, 4, dtype=torch.uint8)
    for length in (7, 8):
        assert unpack_int4(packed, length).shape == (2, length)
    for length in (0, 6, 9):
        with pytest.raises(ValueError, match="4 bytes"):
            unpack_int4(packed, length)
