"""The ops' results on a device: exact integers, one rounding, int8 that differs near ties alone, in every dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.gpu import gpu_of
from ldmq_kernels.kernels.triton.tile_tables import TILES, family
from ldmq_kernels.numerics.formats.int4 import expand_groups, unpack_int4
from python_tests.gpu.calls import CALLS, EXACT, SAME, Call, conv2d, linear, norm, producer, product
from python_tests.kernels.operands import DTYPES, assert_rounded_once

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("without_cudnn")]
CHANNELS = (20, 320, 960, 2560)
PIXELS = {17: (1, 17), 63: (7, 9), 4097: (17, 241)}  # by number of rows
DTYPE = dict(zip(PIXELS, DTYPES, strict=True))  # also by number of rows
INT8_LINEARS = ("linear_w8a8", "linear_w4a8", "linear_static_w8a8")
PRODUCERS = ("layer_norm_quantize", "geglu_quantize", "gelu_quantize", "silu_quantize")
FLIPPED = 0.01  # the largest share of values near a tie


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same operands in every run."""
    torch.manual_seed(0)


def by(backend: str, call: Call) -> tuple[Tensor, ...]:
    with dispatch.use_backend(backend):
        return call()


def assert_same_integers(call: Call) -> None:
    """Of float32 outputs with scales of one, which are the accumulators."""
    (out,), (wanted,) = by("triton", call), by("reference", call)
    assert out.dtype == torch.float32
    assert out.count_nonzero() > out.numel() // 2
    assert torch.equal(out, wanted)


def assert_same_quantized(call: Call) -> None:
    """Of an int8 producer: the scales to a few units in the last place, the integers but for ties."""
    (q, *scales), (wanted, *wanted_scales) = by("triton", call), by("reference", call)
    if call.op.startswith("quantize"):
        assert torch.equal(q, wanted)
        assert all(torch.equal(a, b) for a, b in zip(scales, wanted_scales, strict=True))
        return
    difference = (q.int() - wanted.int()).abs()
    assert difference.max() <= 1
    assert difference.count_nonzero() <= FLIPPED * q.numel() + 1
    assert wanted.count_nonzero() > wanted.numel() // 4
    for scale, other in zip(scales, wanted_scales, strict=True):
        torch.testing.assert_close(scale, other, rtol=1e-5, atol=0)


def assert_one_rounding(call: Call) -> None:
    """Of an int8 product with all terms: within a unit in the last place, which is where two orders may round apart."""
    (out,), (wanted,) = by("triton", call), by("reference", call)
    # a term in float32 is off by 2^-24 of the largest of the terms
    torch.testing.assert_close(out, wanted, rtol=torch.finfo(out.dtype).eps, atol=2**-20 * float(wanted.abs().max()))


def weight_only(call: Call) -> tuple[Tensor, Tensor]:
    """The product of a 16-bit op in float64, and the sum of its terms' absolute values."""
    x, weight, scale, bias, *geometry = call.arguments
    wide, weight = x.double(), weight if "w8" in call.op else unpack_int4(weight, x.shape[-1])
    if geometry:
        kernel, bias = weight.double().permute(0, 3, 1, 2) * scale.double().view(-1, 1, 1, 1), bias.view(1, -1, 1, 1)
        _, stride, padding, dilation, groups, upsample = geometry
        assert (upsample, padding) == (1, (1, 1, 1, 1))
        outs = [
            torch.nn.functional.conv2d(a, b, None, stride, 1, dilation, groups)
            for a, b in ((wide, kernel), (wide.abs(), kernel.abs()))
        ]
    else:
        scale = scale.unsqueeze(-1) if "w8" in call.op else expand_groups(scale, x.shape[-1])
        restored = weight.double() * scale.double()
        outs = [wide @ restored.T, wide.abs() @ restored.abs().T]
    return outs[0] + bias.double(), outs[1] + bias.double().abs()


@pytest.mark.parametrize("name", EXACT)
def test_accumulators_are_exact(name: str, device: torch.device) -> None:
    assert_same_integers(product(name, device, exact=True))


@pytest.mark.parametrize("name", EXACT)
def test_epilogues_round_once(name: str, device: torch.device) -> None:
    assert_one_rounding(product(name, device))


@pytest.mark.parametrize("name", [name for name in CALLS if "quantize" in name])
def test_producers_differ_near_ties_alone(name: str, device: torch.device) -> None:
    assert_same_quantized(CALLS[name](device))


@pytest.mark.parametrize("name", [name for name in CALLS if "a16" in name])
def test_weight_only_gemms_round_once(name: str, device: torch.device) -> None:
    call = CALLS[name](device)
    (out,) = by("triton", call)
    assert_rounded_once(out, *weight_only(call), steps=16)


@pytest.mark.parametrize("table", [name for name in TILES if "a16" in name])
def test_every_tile_of_weight_only_gemms(table: str, device: torch.device) -> None:
    """More than a tile each way, with a K that no block divides; int8 tiles have a test in any place."""
    op, *kind = table.split()
    dtype = torch.float32 if "float32" in kind else torch.float16
    for tile in TILES[table].get(family(gpu_of(device).capability), ()):
        columns = tile.n + 3
        if op.startswith("linear"):
            call = linear(op, tile.m + 5, 224, columns, device, tile=tile, dtype=dtype)
        else:
            channels = 37 if "gather" in kind else 96
            call = conv2d(op, (1, channels, 5, tile.m // 5 + 2), columns, SAME, device, tile=tile, dtype=dtype)
        (out,) = by("triton", call)
        assert_rounded_once(out, *weight_only(call), steps=16)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("op", INT8_LINEARS)
def test_linears_of_odd_sizes_are_exact(op: str, channels: int, device: torch.device) -> None:
    for rows in PIXELS:
        assert_same_integers(linear(op, rows, channels, 320, device, exact=True))


@pytest.mark.parametrize("columns", CHANNELS)
def test_widths_of_outputs_are_exact(columns: int, device: torch.device) -> None:
    for op, rows in itertools.product(INT8_LINEARS, (17, 4097)):
        assert_same_integers(linear(op, rows, 320, columns, device, exact=True))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("op", ["conv2d_w8a8", "conv2d_w4a8"])
def test_convolutions_of_odd_sizes_are_exact(op: str, channels: int, device: torch.device) -> None:
    for height, width in PIXELS.values():
        assert_same_integers(conv2d(op, (1, channels, height, width), 36, SAME, device, exact=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["linear_w8a8", "linear_w4a8", "linear_static_w8a8", "conv2d_w8a8", "conv2d_w4a8"])
def test_every_dtype_of_the_epilogue(name: str, dtype: torch.dtype, device: torch.device) -> None:
    if name.startswith("linear"):
        assert_one_rounding(linear(name, 63, 320, 320, device, dtype=dtype))
    else:
        assert_one_rounding(conv2d(name, (2, 64, 7, 9), 96, SAME, device, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["linear_w8a16", "linear_w4a16", "conv2d_w8a16"])
def test_every_dtype_of_weight_only_products(op: str, dtype: torch.dtype, device: torch.device) -> None:
    for channels in (20, 960):
        if op.startswith("linear"):
            call = linear(op, 63, channels, 320, device, dtype=dtype)
        else:
            call = conv2d(op, (1, channels, 7, 9), 36, SAME, device, dtype=dtype)
        (out,) = by("triton", call)
        assert_rounded_once(out, *weight_only(call), steps=16)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("op", [*PRODUCERS, "quantize_static", "quantize_per_token"])
def test_producers_of_tokens_of_odd_sizes(op: str, channels: int, device: torch.device) -> None:
    width = 2 * channels if op == "geglu_quantize" else channels
    for rows, mode in itertools.product(PIXELS, ("static", "measured")):
        assert_same_quantized(producer(op, (rows, width), mode, device, DTYPE[rows]))


@pytest.mark.parametrize("channels", CHANNELS)
def test_producers_of_pictures_of_odd_sizes(channels: int, device: torch.device) -> None:
    for rows, size in PIXELS.items():
        shape, dtype = (2, channels, *size), DTYPE[rows]
        for mode in ("static", "sample", "token"):
            assert_same_quantized(norm(shape, 5 if channels == 20 else 32, mode, device, dtype))
        assert_same_quantized(producer("quantize_per_sample", shape, "measured", device, dtype))
