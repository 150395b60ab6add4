"""What a quantized layer shows as its `weight`: the float layer's, of its dtype and layout, and read only."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models.embeddings import HunyuanDiTAttentionPool
from torch import nn

from ldmq_kernels.nn import QuantConv2d, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.nn.layers import CONV_SCHEMES, EIGHT_BIT_SCHEMES, LINEAR_SCHEMES, quantized
from python_tests.tiny import same_bits

FLOOR_DB = {"w8": 38.0, "fp": 30.0, "w4": 14.0}
CASES = [
    (scheme, kind)
    for kind in ("linear", "conv2d", "pointwise", "grouped")
    for scheme in (LINEAR_SCHEMES if kind == "linear" else CONV_SCHEMES)
    if not (kind == "grouped" and SCHEMES[scheme].is_rotated)
]


def float_layer(kind: str) -> nn.Linear | nn.Conv2d:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(70, 24)
    size, groups = (1 if kind == "pointwise" else 3), (2 if kind == "grouped" else 1)
    return nn.Conv2d(20, 24, size, groups=groups)


@pytest.mark.parametrize(("scheme", "kind"), CASES)
def test_it_is_the_float_layers_but_for_rounding(scheme: str, kind: str) -> None:
    layer = float_layer(kind)
    smooth = scheme in EIGHT_BIT_SCHEMES and kind != "grouped"
    read = quantized(layer, scheme, smooth=smooth).weight
    assert read.shape == layer.weight.shape
    assert read.dtype == torch.float32
    assert read.is_contiguous()
    assert not read.requires_grad
    assert sqnr_db(layer.weight.detach(), read) > FLOOR_DB[scheme[:2]]


def test_it_has_the_dtype_of_the_model_also_without_a_bias_and_after_a_move() -> None:
    for bias in (True, False):
        layer = quantized(nn.Linear(8, 4, bias=bias).bfloat16(), "w8a8-dynamic")
        assert layer.weight.dtype == torch.bfloat16
        assert layer.half().weight.dtype == torch.float16
        assert copy.deepcopy(layer).weight.dtype == pickle.loads(pickle.dumps(layer)).weight.dtype == torch.float16
        assert layer.to("meta").weight.shape == (4, 8)


def writes_data(weight: torch.Tensor) -> None:
    weight.data = torch.zeros_like(weight)


def adds_to_data(weight: torch.Tensor) -> None:
    weight.data += 1


def copies_into_a_view(weight: torch.Tensor) -> None:
    weight.data.view(-1).copy_(torch.zeros(32))


def writes_an_element(weight: torch.Tensor) -> None:
    weight[0, 0] = 1


def writes_by_out(weight: torch.Tensor) -> None:
    torch.add(weight, 1, out=weight)


@pytest.mark.parametrize(
    "write", [writes_data, adds_to_data, copies_into_a_view, writes_an_element, writes_by_out, nn.init.zeros_]
)
def test_a_write_to_it_would_be_lost_and_is_refused(write) -> None:
    layer = quantized(nn.Linear(8, 4), "w8a16")
    before = layer.plain_weight.clone()
    with pytest.raises(RuntimeError, match=r"cannot be written to.*ldmq\.quantize.*fused"):
        write(layer.weight)
    assert torch.equal(layer.plain_weight, before)


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(4, 8)), torch.zeros(4, 8), None])
def test_another_one_cannot_be_put_in_its_place(value) -> None:
    layer = quantized(nn.Linear(8, 4), "w8a16")
    before = layer.state_dict()
    with pytest.raises(RuntimeError, match="cannot be written to"):
        layer.weight = value
    assert layer.state_dict().keys() == before.keys()


def test_what_is_computed_from_it_is_an_ordinary_tensor() -> None:
    weight = quantized(nn.Linear(8, 4), "w8a16").weight
    for tensor in (weight + 1, weight.clone(), torch.cat([weight]), copy.deepcopy(weight), weight @ weight.T):
        assert type(tensor) is torch.Tensor
    x = torch.randn(2, 8, requires_grad=True)
    nn.functional.linear(x, weight).sum().backward()
    assert torch.equal(x.grad, weight.sum(0).expand(2, 8))


def test_a_layer_that_is_constructed_as_a_float_one_holds_its_parameter() -> None:
    layer = QuantLinear(8, 4)
    assert isinstance(layer.weight, nn.Parameter)
    layer.weight = nn.Parameter(torch.ones(4, 8))
    torch.testing.assert_close(layer(torch.ones(1, 8))[0], layer.bias + 8)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
def test_checkpoints_call_the_integers_weight(scheme: str, assign: bool) -> None:
    layer, other = (quantized(nn.Linear(70, 24), scheme, smooth=scheme in EIGHT_BIT_SCHEMES) for _ in range(2))
    state = layer.state_dict()
    assert set(state) - {"bias"} <= set(SCHEMES[scheme].dtypes)
    assert state["weight"].dtype == SCHEMES[scheme].dtypes["weight"]
    other.load_state_dict(state, assign=assign)
    assert all(same_bits(tensor, state[name]) for name, tensor in other.state_dict().items())
    assert torch.equal(other.weight, layer.weight)
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        other.load_state_dict({name: tensor for name, tensor in state.items() if name != "weight"})


def test_a_compiled_reader_gets_the_same() -> None:
    layer = quantized(nn.Conv2d(4, 6, 3), "w4a8-dynamic")
    read = torch.compile(lambda: layer.weight.square().sum(1), backend="eager", fullgraph=True)
    assert torch.equal(read(), layer.weight.square().sum(1))


def test_attention_of_torch_reads_the_weight_of_its_projection() -> None:
    """nn.MultiheadAttention never calls `out_proj`, and nn.TransformerEncoderLayer's fast path calls no layer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        exact = layer(x)
        layer.self_attn.out_proj = quantized_projection(layer.self_attn.out_proj)
        layer.linear1, layer.linear2 = (quantized(linear, "w8a8-dynamic") for linear in (layer.linear1, layer.linear2))
        assert sqnr_db(exact, layer(x)) > 30


def test_the_pooler_of_hunyuan_dit_reads_the_weights_of_all_its_projections() -> None:
    """It calls none of its four linears; see `multi_head_attention_forward`."""
    torch.manual_seed(0)
    pooler = HunyuanDiTAttentionPool(spacial_dim=5, embed_dim=32, num_heads=4, output_dim=24).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        exact = pooler(x)
        for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
            setattr(pooler, name, quantized(getattr(pooler, name), "w8a8-dynamic"))
        assert sqnr_db(exact, pooler(x)) > 30


def quantized_projection(projection: nn.Linear) -> QuantLinear:
    return QuantLinear.from_float(projection, SCHEMES["w8a8-dynamic"])


def test_convolutions_show_it_too() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    shown = QuantConv2d.from_float(layer, SCHEMES["w8a16"])
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(nn.functional.conv2d(x, shown.weight, shown.bias, padding=1), shown(x))
