"""QuantConv1d and QuantConv3d compute exactly what their stored integers say, in any geometry that models use."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.hessian import HessianObserver
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.backend import Packer
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.layers import refusal
from python_tests.nn.layers import CONV_SCHEMES, SQNR_FLOOR_DB, quantized

CASES = {
    "temporal": ((8, 12, (3, 1, 1)), {"padding": (1, 0, 0)}, (2, 8, 5, 3, 7)),
    "temporal, strided, and padded in space": ((8, 6, (3, 1, 1)), {"stride": 2, "padding": (1, 1, 2)}, (2, 8, 6, 5, 4)),
    "temporal, depthwise": (
        (8, 8, (5, 1, 1)),
        {"groups": 8, "padding": (2, 0, 0), "dilation": (1, 3, 3)},
        (1, 8, 5, 3, 3),
    ),
    "each frame": ((4, 20, (1, 3, 3)), {"padding": (0, 1, 1)}, (2, 4, 3, 9, 7)),
    "patches": ((4, 20, (1, 2, 2)), {"stride": (1, 2, 2), "bias": False}, (1, 4, 3, 6, 8)),
    "each frame, strided and padded in time": ((4, 6, (1, 3, 3)), {"stride": (2, 1, 1), "padding": 1}, (1, 4, 5, 4, 4)),
    "pointwise": ((70, 33, 1), {}, (2, 70, 3, 4, 5)),
    "strided pointwise": ((8, 8, 1), {"stride": 2}, (1, 8, 3, 4, 5)),
    "time and space": ((8, 12, 3), {"padding": 1}, (2, 8, 4, 5, 7)),
    "causal, padded before": ((8, 12, 3), {"padding": (0, 1, 1)}, (1, 8, 3, 5, 7)),
    "downsampler": ((8, 12, 3), {"stride": 2, "padding": 1}, (1, 8, 5, 8, 7)),
    "uneven": ((8, 12, (3, 2, 4)), {"stride": (2, 1, 2), "padding": (2, 1, 0), "dilation": (2, 1, 1)}, (1, 8, 7, 6, 9)),
    "same": ((8, 6, (2, 4, 3)), {"padding": "same", "dilation": (1, 2, 1)}, (1, 8, 5, 6, 7)),
    "grouped": ((8, 12, 3), {"groups": 4, "padding": 1}, (2, 8, 4, 5, 6)),
    "replicate": ((8, 6, 3), {"padding": 1, "padding_mode": "replicate"}, (1, 8, 3, 5, 4)),
    "temporal, circular": ((8, 6, (3, 1, 1)), {"padding": (1, 0, 0), "padding_mode": "circular"}, (1, 8, 4, 3, 4)),
    "whole groups of channels": ((64, 6, 3), {"padding": 1}, (1, 64, 3, 4, 4)),
    "unbatched": ((8, 12, 3), {"padding": 1}, (8, 4, 5, 7)),
    "1-D": ((8, 12, 3), {"padding": 1}, (2, 8, 17)),
    "1-D pointwise": ((70, 33, 1), {}, (2, 70, 63)),
    "1-D, strided and dilated": ((20, 12, 5), {"stride": 2, "dilation": 3, "padding": 6}, (1, 20, 30)),
    "1-D, even, same": ((8, 12, 4), {"padding": "same"}, (1, 8, 17)),
    "1-D, depthwise": ((8, 8, 7), {"groups": 8, "padding": 3}, (2, 8, 17)),
    "1-D, reflected": ((8, 12, 7), {"padding": 3, "padding_mode": "reflect", "bias": False}, (1, 8, 17)),
    "1-D, unbatched": ((8, 12, 3), {}, (8, 17)),
}
SHAPES_OF_INTEREST = ["temporal", "each frame", "pointwise", "time and space", "grouped", "1-D", "1-D pointwise"]


def made(case: str) -> nn.Conv1d | nn.Conv3d:
    torch.manual_seed(0)
    arguments, options, _ = CASES[case]
    return (nn.Conv1d if "1-D" in case else nn.Conv3d)(*arguments, **options).eval()


def given(case: str) -> Tensor:
    return torch.randn(CASES[case][2], generator=torch.Generator().manual_seed(1))


def can_have(case: str, scheme: str) -> bool:
    return not refusal(made(case), SCHEMES[scheme])


def in_int64(layer: nn.Conv1d | nn.Conv3d, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of integers, tap by tap."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x.double(), layer._reversed_padding_repeated_twice, mode=mode).long()
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    size = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, layer.stride, strict=True)]
    total = torch.zeros(x.shape[0], layer.out_channels, *size, dtype=torch.int64)
    inputs, outputs = x.chunk(layer.groups, 1), weight.chunk(layer.groups, 0)
    for tap in itertools.product(*map(range, layer.kernel_size)):
        window = tuple(
            slice(t * d, t * d + s * (n - 1) + 1, s)
            for t, d, s, n in zip(tap, layer.dilation, layer.stride, size, strict=True)
        )
        parts = [
            torch.einsum("kc,nc...->nk...", w[(..., *tap)], part[(..., *window)])
            for part, w in zip(inputs, outputs, strict=True)
        ]
        total += torch.cat(parts, 1)
    return total


@pytest.fixture
def _poisoned_memory():
    """Fill every torch.empty with NaN or the largest integer, so that what a layer leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("case", CASES)
def test_accumulators_are_those_of_int64(case: str) -> None:
    """With scales of 1 a layer's output is its accumulator and the bias."""
    layer = made(case)
    integers = torch.randint(-127, 128, layer.weight.shape)
    integers.view(layer.out_channels, -1)[:, 0] = 127
    x = torch.randint(-127, 128, CASES[case][2])
    with torch.no_grad():
        layer.weight.copy_(integers)
        if layer.bias is not None:
            layer.bias.copy_(torch.arange(layer.out_channels))
        out = quantized(layer, "w8a8-static", scale=1.0)(x.float())
    axes = len(layer.kernel_size)
    exact = in_int64(layer, x if x.dim() == axes + 2 else x.unsqueeze(0), integers)
    if layer.bias is not None:
        exact += torch.arange(layer.out_channels).view(-1, *[1] * axes)
    assert torch.equal(out.double(), (exact if x.dim() == axes + 2 else exact.squeeze(0)).double())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_scheme_is_near_the_float_layer(case: str) -> None:
    layer, x = made(case), given(case)
    with torch.no_grad():
        exact = layer(x)
        for scheme in filter(lambda scheme: can_have(case, scheme), [*CONV_SCHEMES, "w8a8x2"]):
            largest = float(x.abs().max())
            out = quantized(layer, scheme, scale=largest / SCHEMES[scheme].activations.largest)(x)
            assert out.shape == exact.shape
            assert sqnr_db(exact, out) > SQNR_FLOOR_DB[SCHEMES[scheme].format.name] - 2, scheme


@pytest.mark.parametrize("scheme", ["w8a8-static", "w4a8-dynamic"])
@pytest.mark.parametrize("case", SHAPES_OF_INTEREST)
def test_smoothing_multiplies_the_input_and_divides_the_weight(case: str, scheme: str) -> None:
    layer, x = made(case), given(case)
    if layer.groups > 1 or not can_have(case, scheme):
        return
    with torch.no_grad():
        out = quantized(layer, scheme, smooth=True, scale=2 * float(x.abs().max()) / 127)(x)
        assert sqnr_db(layer(x), out) > SQNR_FLOOR_DB[SCHEMES[scheme].format.name] - 6


@pytest.mark.parametrize(
    ("case", "axes"), [("temporal", 1), ("time and space", 1), ("1-D", 1), ("each frame", 2), ("pointwise", 4)]
)
def test_dynamic_scales_are_of_a_sample_a_frame_or_a_position(case: str, axes: int) -> None:
    layer, x = quantized(made(case), "w8a8-dynamic"), given(case)
    other = x.clone()
    place = (0, 0, 0, 0)[: axes - 1]  # of the first sample, with it of a frame, or of a position
    other.movedim(1, -1)[(1, *place)] *= 30
    with torch.no_grad():
        same = torch.ones(x.shape[0], *layer(x).shape[2:], dtype=torch.bool)
        same[(1, *place)] = False
        before, after = layer(x).movedim(1, -1), layer(other).movedim(1, -1)
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[~same], after[~same])


@pytest.mark.parametrize("scheme", ["w8a8-timestep", "w4a8-dynamic", "w8a16"])
@pytest.mark.parametrize("case", SHAPES_OF_INTEREST)
def test_copies_state_and_dtype(case: str, scheme: str) -> None:
    if not can_have(case, scheme):
        return
    layer, x = quantized(made(case), scheme), given(case)
    with torch.no_grad():
        assert layer.weight.shape == made(case).weight.shape
        assert sqnr_db(made(case).weight, layer.weight) > 15
        out = layer(x)
        loaded = quantized(made(case), scheme)
        loaded.load_state_dict(layer.state_dict())
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
            assert torch.equal(other(x), out)
        assert layer(x[:0]).shape == (0, *out.shape[1:])
        half = layer.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert sqnr_db(out, half.float()) > 30


@pytest.mark.parametrize("case", ["temporal, strided, and padded in space", "uneven", "replicate", "1-D, even, same"])
def test_gradients_are_those_of_the_dequantized_weight(case: str) -> None:
    layer, x = quantized(made(case), "w8a8-dynamic"), given(case).requires_grad_()
    exact = made(case)
    with torch.no_grad():
        exact.weight.copy_(layer.weight)
    out = layer(x)
    gradient = torch.randn(out.shape)
    (found,) = torch.autograd.grad(out, x, gradient)
    (expected,) = torch.autograd.grad(exact(x), x, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["time and space", "1-D"])
def test_no_graph_breaks_in_a_compiled_layer(case: str) -> None:
    layer, x = quantized(made(case), "w8a8-dynamic"), given(case)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("case", ["temporal", "time and space", "uneven", "replicate", "1-D, strided and dilated"])
def test_a_hessian_is_that_of_the_stored_weight(case: str) -> None:
    """The sum of squares of an output channel is w H w^T, with w in the order that a checkpoint has it."""
    layer, x = made(case), given(case)
    observer = HessianObserver(case, layer, rows=10**6)
    with torch.no_grad():
        out = layer(x)
        observer(layer, (x,), {}, out)
        bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * len(layer.kernel_size))
        weight = type(quantized(layer, "w8a16")).to_channels_last(layer.weight).flatten(1)
        exact = (out - bias).square().movedim(1, 0).flatten(1).sum(1)
        torch.testing.assert_close((weight @ observer.total * weight).sum(1), exact, rtol=1e-4, atol=1e-4)


def test_a_backend_packs_the_weight_as_the_2d_convolution_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], int]] = []

    def pack(weight: Tensor, multiplier: Tensor | None, channels: int) -> Tensor:
        seen.append((tuple(weight.shape), channels))
        return weight.flip(0).contiguous()

    packer = Packer("upside down", lambda _: True, pack, lambda packed, *_: packed.flip(0))
    monkeypatch.setattr(dispatch, "packer", lambda op, device: packer if op == "conv2d_w8a8" else None)
    layer = quantized(made("time and space"), "w8a8-dynamic")
    assert seen == [((12, 3, 3, 24), 24)]
    assert layer.state_dict()["weight"].shape == (12, 3, 3, 3, 8)
    monkeypatch.undo()
    assert torch.equal(layer.state_dict()["weight"], quantized(made("time and space"), "w8a8-dynamic").plain_weight)


def test_what_cannot_be_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="groups of 64 input channels, which the 8 of a conv3d over time and space"):
        quantized(made("time and space"), "w4a8-dynamic")
    layer = quantized(made("time and space"), "w8a8-dynamic")
    layer.padding = (0, 1, 1)
    with pytest.raises(ValueError, match="its kernel reads 3 frames, and 2 are given"):
        layer(torch.zeros(1, 8, 2, 4, 4))
    with pytest.raises(ValueError, match=r"takes 8 channels along the axis before frames, height and width"):
        layer(torch.zeros(1, 9, 4, 4, 4))
    with pytest.raises(ValueError, match=r"takes 8 channels along the axis before the length"):
        quantized(made("1-D"), "w8a8-dynamic")(torch.zeros(17, 8))
