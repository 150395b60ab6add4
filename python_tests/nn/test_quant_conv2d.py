"""QuantConv2d computes what its stored integers say, in any geometry, and behaves as an nn.Conv2d."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ldmq_kernels.kernels.dispatch import use_backend
from ldmq_kernels.nn import QuantConv2d
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.nn.layers import (
    CONV_SCHEMES,
    EIGHT_BIT_SCHEMES,
    SMOOTHED_OR_NOT,
    SQNR_FLOOR_DB,
    dequantized_input,
    dequantized_weight,
    quantized,
)
from python_tests.tiny import same_bits

CASES = {
    "unet": ((32, 48, 3), {"padding": 1}, (2, 32, 8, 8)),
    "conv_in": ((4, 20, 3), {"padding": 1}, (2, 4, 9, 7)),
    "downsampler": ((20, 20, 3), {"stride": 2, "padding": 1}, (1, 20, 9, 8)),
    "shortcut": ((70, 33, 1), {}, (2, 70, 4, 4)),
    "shortcut without bias": ((70, 33, 1), {"bias": False}, (2, 70, 4, 4)),
    "padded pointwise": ((8, 8, 1), {"padding": 1}, (1, 8, 4, 4)),
    "strided pointwise": ((8, 8, 1), {"stride": 2}, (1, 8, 5, 5)),
    "dilated": ((8, 12, 3), {"dilation": 2, "padding": 2, "bias": False}, (1, 8, 9, 9)),
    "uneven": ((8, 12, (3, 1)), {"stride": (1, 2), "padding": (1, 0)}, (1, 8, 6, 7)),
    "same": ((8, 12, (4, 3)), {"padding": "same"}, (1, 8, 6, 7)),
    "valid": ((8, 12, 5), {"padding": "valid"}, (1, 8, 6, 7)),
    "grouped": ((16, 32, 3), {"groups": 4, "padding": 1}, (2, 16, 5, 5)),
    "depthwise": ((16, 16, 3), {"groups": 16, "padding": 1}, (2, 16, 5, 5)),
    "grouped pointwise": ((16, 32, 1), {"groups": 2}, (2, 16, 5, 5)),
    "circular": ((8, 12, 3), {"padding": 1, "padding_mode": "circular"}, (1, 8, 6, 7)),
    "reflect": ((8, 12, 3), {"padding": (2, 1), "padding_mode": "reflect"}, (1, 8, 6, 7)),
    "replicate pointwise": ((8, 12, 1), {"padding_mode": "replicate"}, (1, 8, 6, 7)),
    "unbatched": ((8, 12, 3), {"padding": 1}, (8, 6, 7)),
    "unbatched pointwise": ((8, 12, 1), {}, (8, 6, 7)),
    "one pixel": ((32, 20, 3), {"padding": 1}, (3, 32, 1, 1)),
    "channels over several groups": ((130, 20, 3), {"padding": 1}, (1, 130, 4, 4)),
}


def pairs(*cases):
    """Each scheme with each case; channels of groups are not rotated."""
    of_groups = [case for case in cases if "groups" in CASES[case][1]]
    return [(s, case) for case in cases for s in CONV_SCHEMES if not (SCHEMES[s].is_rotated and case in of_groups)]


def make(case="unet", dtype=torch.float32):
    torch.manual_seed(0)
    arguments, options, shape = CASES[case]
    layer = nn.Conv2d(*arguments, **options).to(dtype)
    return layer, torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(layer, x):
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    is_pointwise_linear = (
        layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
    )
    grid = dequantized_input(layer, batch, 1, (1,) if is_pointwise_linear else (1, 2, 3))
    plain = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        dtype=torch.float64,
    )
    with torch.no_grad():
        plain.weight.copy_(dequantized_weight(layer).permute(0, 3, 1, 2))
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
        out = plain(grid)
    return out if x.dim() == 4 else out.squeeze(0)


@pytest.mark.parametrize(("scheme", "case"), pairs(*CASES))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_the_output_is_the_convolution_of_what_is_stored(scheme, case, memory_format):
    float_layer, x = make(case)
    if x.dim() == 4:
        x = x.contiguous(memory_format=memory_format)
    layer = quantized(float_layer, scheme)
    with torch.no_grad():
        out = layer(x)
    torch.testing.assert_close(out.double(), expected(layer, x), rtol=1e-5, atol=1e-5)
    assert out.shape == float_layer(x).shape


@pytest.mark.parametrize("scheme", EIGHT_BIT_SCHEMES)
@pytest.mark.parametrize("case", ["unet", "shortcut", "circular", "downsampler"])
def test_smoothing_multiplies_the_input_and_not_the_padding(scheme, case):
    float_layer, x = make(case)
    layer = quantized(float_layer, scheme, smooth=True)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scheme", "smooth"), [pair for pair in SMOOTHED_OR_NOT if pair[0] in CONV_SCHEMES])
@pytest.mark.parametrize("case", ["unet", "shortcut"])
def test_the_output_is_near_the_float_layer(scheme, smooth, case):
    float_layer, x = make(case)
    smallest_smoothing = 2.0 if smooth else 1.0
    layer = quantized(float_layer, scheme, smooth=smooth, scale=smallest_smoothing * float(x.abs().max()) / 127)
    with torch.no_grad():
        floor = SQNR_FLOOR_DB[SCHEMES[scheme].format.name] - (4 if smooth else 0)
        assert sqnr_db(float_layer(x), layer(x)) > floor


@pytest.mark.parametrize("scheme", CONV_SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["unet", "shortcut"])
def test_half_precision_rounds_the_exact_result_once(scheme, dtype, case):
    float_layer, x = make(case, dtype)
    layer = quantized(float_layer, scheme)
    with torch.no_grad():
        out = layer(x)
    assert out.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected(layer, x), rtol=2 * step, atol=2 * step)


@pytest.mark.parametrize("scheme", CONV_SCHEMES)
@pytest.mark.parametrize("case", ["unet", "shortcut", "downsampler", "circular"])
def test_an_empty_batch_gives_an_empty_output(scheme, case):
    float_layer, x = make(case)
    assert quantized(float_layer, scheme)(x[:0]).shape == (0, *float_layer(x).shape[1:])


@pytest.mark.parametrize(("scheme", "case"), pairs("unet", "shortcut", "grouped"))
def test_the_reference_backend_gives_the_same_from_the_plain_weight(scheme, case):
    float_layer, x = make(case)
    layer = quantized(float_layer, scheme)
    with torch.no_grad():
        out = layer(x)
        layer.unpack()
        with use_backend("reference"):
            torch.testing.assert_close(layer(x), out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", EIGHT_BIT_SCHEMES)
@pytest.mark.parametrize("case", ["unet", "shortcut"])
def test_a_sample_of_a_batch_is_computed_as_it_would_be_alone(scheme, case):
    float_layer, x = make(case)
    layer = quantized(float_layer, scheme)
    x[1] *= 30
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("scheme", "case"), pairs("unet", "shortcut", "grouped", "channels over several groups"))
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a call"])
def test_copies_and_state_are_exact_before_and_after_the_first_call(scheme, case, ran):
    """oneDNN's blocks are laid out in the first call."""
    float_layer, x = make(case)
    layer = quantized(float_layer, scheme)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        if ran:
            layer(x)
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        loaded = quantized(nn.Conv2d(*CASES[case][0], **CASES[case][1]), scheme)
        if ran:
            loaded(x)
        loaded.load_state_dict(layer.state_dict())
        for other in (layer, loaded, *copies):
            state = other.state_dict()
            assert set(state) - {"bias"} <= set(layer.scheme.dtypes)
            for name, tensor in stored.items():
                assert same_bits(state[name], tensor), name
                assert state[name].is_contiguous()
            assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("scheme", CONV_SCHEMES)
def test_a_change_of_dtype_leaves_integers_and_scales_alone(scheme):
    layer = quantized(make()[0], scheme, smooth=scheme in EIGHT_BIT_SCHEMES)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.half()
    for name, tensor in layer.state_dict().items():
        assert same_bits(tensor, before[name]) or name == "bias"
        assert tensor.dtype == (torch.float16 if name == "bias" else before[name].dtype)


@pytest.mark.needs_exact_onednn
def test_a_layer_on_the_cpu_backend_holds_one_copy_of_its_weight():
    layer = quantized(make()[0], "w8a8-dynamic")
    assert layer.packed_weight is not None
    assert "quantized_weight" not in layer._buffers
    assert layer.plain_weight.shape == (48, 3, 3, 32)


def test_constructed_as_its_float_class_it_is_a_float_layer():
    """PEFT makes LoRA's layers with type(base_layer)(...)."""
    layer = quantized(make()[0], "w8a8-dynamic")
    torch.manual_seed(3)
    fresh = type(layer)(32, 8, kernel_size=3, stride=1, padding=1, bias=False)
    torch.manual_seed(3)
    plain = nn.Conv2d(32, 8, kernel_size=3, stride=1, padding=1, bias=False)
    x = make()[1]
    assert torch.equal(fresh(x), plain(x))
    assert set(fresh.state_dict()) == {"weight"}


def test_a_grouped_convolution_is_not_rotated():
    with pytest.raises(ValueError, match="w8a8-rotated rotates channels, which a grouped"):
        QuantConv2d.from_float(make("depthwise")[0], SCHEMES["w8a8-rotated"])


def test_rotation_rounds_one_large_channel_more_finely():
    float_layer, x = make()
    x[:, 5] *= 30
    with torch.no_grad():
        noise = {name: sqnr_db(float_layer(x), quantized(float_layer, name)(x)) for name in CONV_SCHEMES}
    assert noise["w8a8-rotated"] > noise["w8a8-dynamic"] + 6


def test_a_scheme_that_convolutions_do_not_have_is_refused():
    with pytest.raises(ValueError, match="there is no w4a16 for a conv2d: choose w8a8-static"):
        QuantConv2d.from_float(make()[0], SCHEMES["w4a16"])


def test_its_text_says_geometry_and_scheme():
    text = repr(quantized(make("downsampler")[0], "w4a8-dynamic"))
    assert text.startswith("QuantConv2d(20, 20, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), w4a8-dynamic")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", CONV_SCHEMES)
@pytest.mark.parametrize("case", ["unet", "shortcut", "circular", "unbatched"])
def test_compiled_without_graph_breaks_it_gives_the_same(scheme, case):
    float_layer, x = make(case)
    layer = quantized(float_layer, scheme, smooth=scheme in EIGHT_BIT_SCHEMES)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
