"""QuantLinear computes what its stored integers say, and behaves as an nn.Linear wherever one is expected."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ldmq_kernels.kernels.dispatch import use_backend
from ldmq_kernels.nn import QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.nn.layers import (
    EIGHT_BIT_SCHEMES,
    LINEAR_SCHEMES,
    SMOOTHED_OR_NOT,
    SQNR_FLOOR_DB,
    dequantized_input,
    dequantized_weight,
    quantized,
)
from python_tests.tiny import same_bits


def make(in_features=70, out_features=33, *, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias).to(dtype)


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(layer, x):
    rows = dequantized_input(layer, x, x.dim() - 1, (-1,))
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(rows, dequantized_weight(layer), bias)


@pytest.mark.parametrize(("scheme", "smooth"), SMOOTHED_OR_NOT)
@pytest.mark.parametrize(
    ("shape", "out_features", "bias"),
    [
        ((70,), 33, True),
        ((17, 70), 33, False),
        ((2, 5, 320), 20, True),
        ((2, 3, 4, 4), 1, True),
        ((63, 960), 40, False),
    ],
)
def test_the_output_is_the_product_of_what_is_stored(scheme, smooth, shape, out_features, bias):
    layer = quantized(make(shape[-1], out_features, bias=bias), scheme, smooth=smooth)
    x = inputs(*shape)
    out = layer(x)
    assert out.shape == (*shape[:-1], out_features)
    torch.testing.assert_close(out.double(), expected(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
def test_the_output_is_near_the_float_layer(scheme):
    layer = make(320, 320)
    x = inputs(64, 320)
    test = quantized(layer, scheme, scale=float(x.abs().max()) / 127)(x)
    assert sqnr_db(layer(x).detach(), test.detach()) > SQNR_FLOOR_DB[SCHEMES[scheme].format.name]


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_exact_result_once(scheme, dtype):
    layer = quantized(make(70, 33, dtype=dtype), scheme)
    x = inputs(17, 70, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected(layer, x), rtol=2 * step, atol=2 * step)


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
@pytest.mark.parametrize("shape", [(0, 70), (2, 0, 70)])
def test_an_empty_batch_gives_an_empty_output(scheme, shape):
    assert quantized(make(), scheme)(inputs(*shape)).shape == (*shape[:-1], 33)


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
def test_the_reference_backend_gives_the_same_from_the_plain_weight(scheme):
    layer = quantized(make(), scheme, smooth=scheme in EIGHT_BIT_SCHEMES)
    x = inputs(17, 70)
    out = layer(x)
    layer.unpack()
    with use_backend("reference"):
        torch.testing.assert_close(layer(x), out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent_and_compute_the_same(scheme, duplicate):
    layer = quantized(make(), scheme, smooth=scheme in EIGHT_BIT_SCHEMES)
    x = inputs(5, 70)
    out = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), out)
    assert (other.packed_weight is None) == (layer.packed_weight is None)
    with torch.no_grad():
        other.bias.add_(1)
    assert torch.equal(layer(x), out)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "fp8-dynamic"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_shallow_copy_computes_the_same_and_leaves_the_layer_as_it_was(scheme, is_packed):
    layer, x = quantized(make(), scheme), inputs(5, 70)
    if not is_packed:
        layer.unpack()
    held, out = set(layer._buffers), layer(x)
    other = copy.copy(layer)
    torch.testing.assert_close(other(x), out)
    assert set(layer._buffers) == held
    assert torch.equal(layer(x), out)
    assert same_bits(pickle.loads(pickle.dumps(layer)).plain_weight, layer.plain_weight)


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
def test_the_state_dict_holds_plain_tensors_and_restores_them_bit_for_bit(scheme):
    layer = quantized(make(), scheme, smooth=scheme in EIGHT_BIT_SCHEMES)
    stored = layer.state_dict()
    assert set(stored) - {"bias"} <= set(layer.scheme.dtypes)
    assert all(tensor.layout == torch.strided and tensor.is_contiguous() for tensor in stored.values())
    other = quantized(nn.Linear(70, 33), scheme, smooth=scheme in EIGHT_BIT_SCHEMES)
    other.load_state_dict(stored)
    for name, tensor in other.state_dict().items():
        assert same_bits(tensor, stored[name]), name
    assert torch.equal(other(inputs(5, 70)), layer(inputs(5, 70)))


@pytest.mark.parametrize("scheme", EIGHT_BIT_SCHEMES)
def test_packed_and_plain_layers_have_the_same_state(scheme):
    layer = quantized(make(), scheme, smooth=True)
    packed = layer.state_dict()
    weight = layer.plain_weight
    layer.unpack()
    assert same_bits(layer.plain_weight, weight)
    for name, tensor in layer.state_dict().items():
        assert same_bits(tensor, packed[name]), name


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_a_change_of_dtype_leaves_integers_and_scales_alone(scheme, move):
    layer = quantized(make(), scheme, smooth=scheme in EIGHT_BIT_SCHEMES)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    inv_scale = layer.input_inv_scale
    move(layer)
    for name, tensor in layer.state_dict().items():
        if name != "bias":
            assert tensor.dtype == before[name].dtype
            assert same_bits(tensor, before[name]), name
    assert layer.bias.dtype != torch.float32
    if inv_scale is not None:
        assert torch.equal(layer.input_inv_scale, inv_scale)


@pytest.mark.parametrize("name", ["weight_scale", "group_scale", "input_scale", "smoothing"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_a_damaged_scale_is_refused_by_name_and_the_layer_keeps_its_own(name, value):
    scheme = "w4a16" if name == "group_scale" else "w8a8-static"
    model = nn.Sequential(quantized(make(), scheme, smooth=name == "smoothing"))
    damaged = copy.deepcopy(model.state_dict())
    damaged[f"0.{name}"].view(-1)[0] = value
    out = model(inputs(5, 70))
    with pytest.raises(ValueError, match=rf"0\.{name} holds a value that is not finite and positive"):
        model.load_state_dict(damaged)
    assert torch.equal(model(inputs(5, 70)), out)


def test_misshapen_missing_and_float_tensors_are_refused_by_name():
    model = nn.Sequential(quantized(make(), "w8a8-static"))
    stored = model.state_dict()
    with pytest.raises(RuntimeError, match=r"0\.weight_scale"):
        model.load_state_dict(stored | {"0.weight_scale": torch.ones(32)})
    with pytest.raises(RuntimeError, match=r"Missing.*0\.input_scale"):
        model.load_state_dict({name: t for name, t in stored.items() if name != "0.input_scale"})
    with pytest.raises(ValueError, match=r"0\.weight is torch\.float32, torch\.int8 is needed"):
        model.load_state_dict({"0.weight": make().weight, "0.bias": make().bias})


def test_from_float_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="w8a8-static needs a calibrated input scale"):
        QuantLinear.from_float(make(), SCHEMES["w8a8-static"])
    with pytest.raises(ValueError, match="input_scale holds a value that is not finite and positive"):
        QuantLinear.from_float(make(), SCHEMES["w8a8-static"], input_scale=torch.zeros(1))
    broken = make()
    with torch.no_grad():
        broken.weight[3, 4] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        QuantLinear.from_float(broken, SCHEMES["w8a16"])


def test_constructed_as_its_float_class_it_is_a_float_layer():
    """PEFT makes LoRA's layers with type(base_layer)(...)."""
    layer = quantized(make(), "w8a8-dynamic")
    torch.manual_seed(3)
    fresh = type(layer)(70, 8, bias=False)
    torch.manual_seed(3)
    plain = nn.Linear(70, 8, bias=False)
    assert torch.equal(fresh.weight, plain.weight)
    x = inputs(5, 70)
    assert torch.equal(fresh(x), plain(x))
    assert fresh.weight.requires_grad
    assert set(fresh.state_dict()) == {"weight"}


def test_its_text_says_shape_scheme_and_scale():
    assert repr(quantized(make(), "w8a8-static", smooth=True)).startswith(
        "QuantLinear(in_features=70, out_features=33, bias=True, w8a8-static, input_scale=0.02, smoothed"
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
def test_compiled_without_graph_breaks_it_gives_the_same(scheme):
    layer = quantized(make(), scheme, smooth=scheme in EIGHT_BIT_SCHEMES)
    x = inputs(5, 70)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
def test_under_meta_it_tells_the_output_shape(scheme):
    layer = quantized(make(), scheme).to("meta")
    assert layer(torch.empty(2, 5, 70, device="meta")).shape == (2, 5, 33)


def test_beside_a_token_of_large_values_fp8_keeps_more_of_the_others_and_int8_more_without_one():
    layer, x = make(320, 64), inputs(32, 320)
    x[0] *= 60
    kept = {}
    for scheme in ("w8a8-static", "fp8-static"):
        for first in (0, 1):  # a range that covers all tokens, or all but the large one
            scale = float(x[first:].abs().max()) / SCHEMES[scheme].activations.largest
            with torch.no_grad():
                kept[scheme, first] = sqnr_db(layer(x[1:]), quantized(layer, scheme, scale=scale)(x[1:]))
    assert kept["w8a8-static", 1] > kept["fp8-static", 1] + 5
    assert kept["fp8-static", 0] > kept["w8a8-static", 0] + 10
    assert kept["fp8-static", 0] > kept["fp8-static", 1] - 1
