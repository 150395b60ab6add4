"""Operands whose offsets do not fit in 32 bits, and more rows than a launch has programs in its second axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldmq_kernels import ops
from python_tests.gpu.calls import SAME, STRIDED, UPSAMPLED, int8, weights

pytestmark = pytest.mark.gpu
MANY_ROWS = 65535 * 128 + 129
LARGE = 2**31


@pytest.fixture(autouse=True)
def memory(device: torch.device) -> None:
    """Room for the largest of these tests, and what earlier ones have left given back."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(device)[0] < 24 * 2**30:
        pytest.skip("24 GiB of free memory are needed")


def ends(x: Tensor) -> Tensor:
    """The first and the last rows of x."""
    return torch.cat([x[:100], x[-100:]])


def ones(device: torch.device, *shape: int) -> Tensor:
    return torch.ones(shape, device=device)


def test_an_input_of_more_than_2_to_31_elements(device: torch.device) -> None:
    rows, depth = LARGE // 320 + 1000, 320
    x = torch.zeros(rows, depth, dtype=torch.int8, device=device)
    x[-100:] = int8(device, 100, depth)
    weight = int8(device, 16, depth)
    out = ops.linear_w8a8(x, ones(device, 1), weight, ones(device, 16), None, None, torch.float32)
    assert not out[:-100].any()
    assert torch.equal(out[-100:].double(), x[-100:].double() @ weight.double().T)


@pytest.mark.parametrize("op", ["linear_w8a8", "linear_w4a8", "linear_static_w8a8", "linear_w8a16"])
def test_an_output_of_more_than_2_to_31_elements(op: str, device: torch.device) -> None:
    """And a residual of that size, and more than 65535 tiles of rows: both ends as of a call with these rows alone."""
    columns, one = LARGE // MANY_ROWS + 1, ones(device, 1)
    half = {"dtype": torch.float16, "device": device}
    weight, scale = weights(op, device, columns, 16), 0.01 * ones(device, columns)
    residual = torch.zeros(MANY_ROWS, columns, **half)
    residual[-100:] = 1

    def run(x: Tensor, residual: Tensor) -> Tensor:
        if op == "linear_w8a16":
            return ops.linear_w8a16(x.half(), *weight, scale, None)
        if op == "linear_static_w8a8":
            return ops.linear_static_w8a8(x.half(), one, one, *weight, scale, None, residual)
        return getattr(ops, op)(x, one, *weight, scale, None, residual, torch.float16)

    x = int8(device, MANY_ROWS, 16)
    out = run(x, residual)
    assert out.numel() > LARGE
    assert torch.equal(ends(out), run(ends(x), ends(residual)))


@pytest.mark.parametrize("geometry", [SAME, UPSAMPLED, STRIDED], ids=["tma_tiled", "upsampled", "strided"])
@pytest.mark.parametrize("op", ["conv2d_w8a8", "conv2d_w4a8"])
def test_a_convolution_of_more_than_2_to_31_elements(op: str, geometry: tuple[Any, ...], device: torch.device) -> None:
    """A picture in the first and in the last place among empty ones: the same output in both, and zeros between."""
    samples, height, width = 108, 251, 249
    assert samples * height * width * 320 > LARGE
    picture = int8(device, height, width, 320)
    x = torch.zeros(samples, height, width, 320, dtype=torch.int8, device=device)
    x[0] = x[-1] = picture
    weight = weights(op, device, 16, 3, 3, 320)
    terms = ones(device, 16), None, None, None

    def run(x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        return getattr(ops, op)(x, ones(device, 1), *weight, *terms, *geometry, torch.float32).permute(0, 2, 3, 1)

    out, wanted = run(x), run(picture[None])
    assert wanted.any()
    assert torch.equal(out[:1], wanted)
    assert torch.equal(out[-1:], wanted)
    assert not out[1:-1].any()


@pytest.mark.parametrize("op", ["quantize_static", "quantize_per_token", "layer_norm", "silu", "geglu"])
def test_a_producer_of_more_than_2_to_31_elements(op: str, device: torch.device) -> None:
    """More rows than 65535 * 128; each row, or element, on its own, so that both ends are as of a call with them."""
    width = LARGE // MANY_ROWS + 1
    width += width % 2
    x = torch.randn(1024, width, dtype=torch.float16, device=device).repeat(MANY_ROWS // 1024 + 1, 1)
    assert x.numel() > LARGE
    calls = {
        "quantize_static": lambda x: (ops.quantize_static(x, 30 * ones(device, 1), -1),),
        "quantize_per_token": lambda x: ops.quantize_per_token(x, None),
        "layer_norm": lambda x: ops.layer_norm_quantize(x, None, None, 1e-5, None, None),
        "silu": lambda x: ops.silu_quantize(x, None, None),
        "geglu": lambda x: ops.geglu_quantize(x, None, None),
    }
    outs, wanted = calls[op](x), calls[op](ends(x))
    assert all(torch.equal(ends(out), other) for out, other in zip(outs, wanted, strict=True))


def test_a_norm_of_more_than_2_to_31_elements(device: torch.device) -> None:
    """A picture of 48 MiB, and one of it repeated to 4.5 GiB: the same scales and integers at both ends."""
    picture = torch.randn(1, 128, 512, 384, dtype=torch.float16, device=device)
    picture = picture.contiguous(memory_format=torch.channels_last)
    many = picture.permute(0, 2, 3, 1).repeat(90, 1, 1, 1).permute(0, 3, 1, 2)
    assert many.numel() > LARGE
    wanted, scale = ops.group_norm_silu_quantize(picture, None, None, 32, 1e-5, True, None, None, False)
    out, scales = ops.group_norm_silu_quantize(many, None, None, 32, 1e-5, True, None, None, False)
    # the parts of a sample are fewer, so its sums are rounded otherwise
    assert torch.allclose(scales, scale.expand(90), rtol=1e-5)
    assert all((out[i : i + 1].int() - wanted.int()).abs().max() <= 1 for i in (0, 45, 89))
    wanted, scale = ops.quantize_per_sample(picture, None)
    out, scales = ops.quantize_per_sample(many, None)
    assert torch.equal(scales, scale.expand(90))
    assert all(torch.equal(out[i : i + 1], wanted) for i in (0, 45, 89))
