"""What a layer computes beside its integers: the first token's row, a corrected bias, GPTQ rounding."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.kernels.dispatch import use_backend
from ldmq_kernels.nn import QuantConv2d, QuantizedLayer, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.numerics.formats.int8 import quantize_weight_int8
from ldmq_kernels.numerics.hadamard import block_size, rotate
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.nn.layers import EIGHT_BIT_SCHEMES, LINEAR_SCHEMES

DUPLICATES = [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), lambda m: m.double().float()]
WITH_FIRST_TOKEN = [name for name in EIGHT_BIT_SCHEMES if SCHEMES[name].format.first_token_op]


def made(layer: nn.Module, scheme: str, **corrections: Any) -> Any:
    kind: type[QuantizedLayer] = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    scale = torch.tensor([0.03] if not scheme.endswith("timestep") else [0.03, 0.02])
    return kind.from_float(layer, SCHEMES[scheme], input_scale=scale, **corrections)


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(70, 33, bias=bias).to(dtype)


def convolution(case: str) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    layer = {
        "unet": lambda: nn.Conv2d(20, 12, 3, padding=1),
        "downsampler": lambda: nn.Conv2d(20, 12, 3, stride=2, padding=1, bias=False),
        "shortcut": lambda: nn.Conv2d(20, 12, 1),
        "circular": lambda: nn.Conv2d(20, 12, (3, 1), dilation=2, padding=(2, 0), padding_mode="circular"),
    }[case]()
    return layer, torch.randn(2, 20, 9, 7)


def text(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(3, 11, 70, generator=torch.Generator().manual_seed(1))
    x[:, 0, 5] = 300.0  # the first token's outlier
    return x.to(dtype)


SMOOTHING = torch.exp2(torch.arange(70) % 3 - 1.0)


def sixteen_bit(layer: Any, x: Tensor) -> Tensor:
    """The row of 16-bit activations from what is stored."""
    stored = layer.state_dict()
    if "smoothing" in stored:
        x = (x * stored["smoothing"]).to(x.dtype)
    growth = block_size(70) if layer.scheme.is_rotated else 1
    if layer.scheme.is_rotated:
        x = (rotate(x.float()) / growth).to(x.dtype)
    scale = stored["weight_scale"] * growth
    if "multiplier" not in stored:
        return ops.linear_w8a16(x, stored["weight"], scale, layer.bias)
    group_scale = stored["multiplier"].float() * scale[:, None]
    return ops.linear_w4a16(x, stored["weight"], group_scale, layer.bias)


@pytest.mark.parametrize("scheme", WITH_FIRST_TOKEN)
@pytest.mark.parametrize("smoothing", [None, SMOOTHING], ids=["plain", "smoothed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()  # with gradients an op that does not round is computed by its definition, in another order of sums
def test_the_first_tokens_row_is_that_of_16_bit_and_the_others_are_as_without_it(
    scheme: str, smoothing: Tensor | None, dtype: torch.dtype
) -> None:
    layer = made(linear(dtype), scheme, smoothing=smoothing, first_token=True)
    plain = made(linear(dtype), scheme, smoothing=smoothing)
    x = text(dtype)
    out = layer(x)
    assert torch.equal(out[:, :1], sixteen_bit(layer, x[:, :1]))
    calm = x.clone()
    calm[:, 0] = 0
    assert torch.equal(out[:, 1:], plain(calm)[:, 1:])
    assert float(sqnr_db(plain(x)[:, :1], out[:, :1])) < 30 or scheme.endswith(("dynamic", "rotated"))
    residual = torch.randn(3, 11, 33).to(dtype)
    added = layer.project(x, residual)
    assert torch.equal(added[:, :1], out[:, :1] + residual[:, :1])
    assert torch.equal(added[:, 1:], plain.project(x, residual)[:, 1:])


@pytest.mark.parametrize("scheme", WITH_FIRST_TOKEN)
@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_copies_and_moves_keep_the_first_token(scheme: str, duplicate: Any) -> None:
    layer = made(linear(), scheme, smoothing=SMOOTHING, first_token=True)
    out = layer(text())
    assert torch.equal(duplicate(layer)(text()), out)
    assert set(layer.state_dict()) == set(made(linear(), scheme, smoothing=SMOOTHING).state_dict())
    layer.unpack()
    with use_backend("reference"):
        torch.testing.assert_close(layer(text()), out, rtol=1e-5, atol=1e-5)


def test_the_first_token_of_16_bit_activations_is_as_all_others() -> None:
    layer = made(linear(), "w8a16", first_token=True)
    assert torch.equal(layer(text()), made(linear(), "w8a16")(text()))


def test_first_token_refuses_other_shapes_and_convolutions() -> None:
    layer = made(linear(), "w8a8-static", first_token=True)
    with pytest.raises(ValueError, match=r"\(B, T, C\), this one has shape \(11, 70\)"):
        layer(text()[0])
    assert layer(text()[:0]).shape == (0, 11, 33)
    assert layer(text()[:, :1]).shape == (3, 1, 33)
    with pytest.raises(ValueError, match="first_token is for linears"):
        made(nn.Conv2d(4, 4, 3), "w8a8-static", first_token=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_correction_is_added_to_a_bias_of_the_layers_own(dtype: torch.dtype, bias: bool) -> None:
    float_layer, correction = linear(dtype, bias=bias), torch.randn(33)
    before = None if float_layer.bias is None else float_layer.bias.detach().clone()
    layer = made(float_layer, "w8a8-dynamic", bias_correction=correction)
    wanted = correction if before is None else before.float() + correction
    assert layer.bias.dtype == dtype
    assert torch.equal(layer.bias.detach(), wanted.to(dtype))
    assert layer.adds_bias == (not bias)
    if before is not None:
        assert torch.equal(float_layer.bias, before)
        assert layer.bias is not float_layer.bias
    else:
        assert float_layer.bias is None
    torch.testing.assert_close(
        (layer(text(dtype)) - made(float_layer, "w8a8-dynamic")(text(dtype))).mean((0, 1)).float(),
        correction,
        rtol=1e-2,
        atol=2e-2 if dtype == torch.float16 else 1e-5,
    )


def test_a_static_scheme_takes_one_scale() -> None:
    with pytest.raises(ValueError, match="w8a8-static needs a calibrated input scale, this has 3 scales"):
        QuantLinear.from_float(linear(), SCHEMES["w8a8-static"], input_scale=torch.ones(3))


def correlated(rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(rows, 9, generator=generator) @ torch.randn(9, width, generator=generator)


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
def test_a_hessian_makes_gptq_rounding_which_errs_less_on_those_inputs(scheme: str) -> None:
    float_layer, x = linear(), correlated(500, 70)
    smoothing = SMOOTHING if scheme in EIGHT_BIT_SCHEMES else None
    layers = [made(float_layer, scheme, smoothing=smoothing, hessian=h) for h in (None, x.T @ x)]
    for layer in layers:
        layer.unpack()
    near, gptq = (float(sqnr_db(x @ float_layer.weight.T, x @ layer.real_weight().T)) for layer in layers)
    assert gptq > near + 3


def test_the_hessian_is_taken_after_smoothing_in_the_order_of_the_weights_axes() -> None:
    float_layer, _ = convolution("unet")
    smoothing = SMOOTHING[:20]
    x = correlated(600, 180)  # (R, S, C) of the patches
    layer = made(float_layer, "w8a8-dynamic", smoothing=smoothing, hessian=x.T @ x)
    smoothed = (x.view(-1, 3, 3, 20) * smoothing).flatten(1)
    weight = float_layer.weight.detach().permute(0, 2, 3, 1) / smoothing
    integers, scale = quantize_weight_int8(weight, smoothed.T @ smoothed)
    assert (
        float((layer.plain_weight != integers).float().mean()) < 0.01
    )  # sums in another order turn few roundings over
    assert torch.equal(layer.weight_scale, scale)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8-timestep", "w4a8-dynamic", "w8a16"])
def test_compiled_without_graph_breaks_all_corrections_give_the_same(scheme: str) -> None:
    layer = made(linear(), scheme, smoothing=SMOOTHING, first_token=True, bias_correction=torch.randn(33))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(text()), layer(text()))


@pytest.mark.parametrize("scheme", ["w8a8x2", "w4a8x2"])
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("smoothing", [None, SMOOTHING])
def test_a_split_linear_is_as_exact_as_its_weight(scheme, backend, smoothing):
    x = 0.4 * torch.randn(3, 11, 70, generator=torch.Generator().manual_seed(2))
    layer = made(linear(), scheme, smoothing=smoothing)
    with use_backend(backend) if backend else contextlib.nullcontext():
        out = layer(x)
    exact = nn.functional.linear(x, layer.real_weight(), layer.bias)
    single = made(linear(), scheme.replace("x2", "-static"), smoothing=smoothing)
    assert sqnr_db(exact, out) > 75
    assert sqnr_db(exact, out) > sqnr_db(exact, single(x)) + 30


@pytest.mark.parametrize("case", ["unet", "downsampler", "shortcut", "circular"])
def test_a_split_convolution_is_as_exact_as_its_weight(case):
    layer, x = convolution(case)
    x = 0.4 * x  # within the calibrated range
    quantized = made(layer, "w8a8x2")
    clone = copy.deepcopy(layer)
    weight = quantized.real_weight().permute(0, 3, 1, 2)
    with torch.no_grad():
        clone.weight.copy_(weight)
        assert sqnr_db(clone(x), quantized(x)) > 75
