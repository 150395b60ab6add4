"""What only a device can show of the Triton kernels: repeatability, graphs, streams, large sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldmq_kernels import ops
from ldmq_kernels.numerics.packing import pack_int4

pytestmark = pytest.mark.gpu
GEOMETRY = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)


def random_int8(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def calls(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Every op at a shape from a UNet, on operands that stay where they are."""
    half = {"dtype": torch.float16, "device": device}
    x, picture = torch.randn(2048, 640, **half), torch.randn(2, 320, 64, 64, **half)
    x_q, picture_q = random_int8(device, 2048, 640), random_int8(device, 2, 320, 64, 64)
    rows, one = torch.rand(2048, device=device), torch.rand(1, device=device)
    weight, scale, bias = random_int8(device, 1280, 640), torch.rand(1280, device=device), torch.randn(1280, **half)
    weight4 = pack_int4(torch.randint(-7, 8, (1280, 640), dtype=torch.int8, device=device))
    multiplier = torch.randint(1, 19, (1280, 10), dtype=torch.uint8, device=device)
    group_scale = torch.rand(1280, 10, device=device)
    kernel, kernel_scale = random_int8(device, 320, 3, 3, 320), torch.rand(320, device=device)
    kernel4 = pack_int4(torch.randint(-7, 8, (320, 3, 3, 320), dtype=torch.int8, device=device))
    kernel_multiplier = torch.randint(1, 19, (320, 3, 3, 5), dtype=torch.uint8, device=device)
    norm = torch.randn(320, **half), torch.randn(320, **half)
    terms = torch.randn(320, **half), torch.randn(2, 320, **half), torch.randn_like(picture)
    float16 = torch.float16
    return {
        "quantize_static": lambda: ops.quantize_static(picture, kernel_scale, 1),
        "quantize_per_token": lambda: ops.quantize_per_token(x, None)[0],
        "quantize_per_sample": lambda: ops.quantize_per_sample(picture, kernel_scale)[0],
        "group_norm_silu_quantize": lambda: ops.group_norm_silu_quantize(
            picture, *norm, 32, 1e-5, True, None, kernel_scale, False
        )[0],
        "group_norm_silu_quantize small": lambda: ops.group_norm_silu_quantize(
            picture[..., :8, :8], *norm, 32, 1e-5, True, kernel_scale, None, False
        )[0],
        "layer_norm_quantize": lambda: ops.layer_norm_quantize(x, None, None, 1e-5, None, None)[0],
        "geglu_quantize": lambda: ops.geglu_quantize(x, one, None)[0],
        "silu_quantize": lambda: ops.silu_quantize(x, None, None)[0],
        "linear_w8a8": lambda: ops.linear_w8a8(x_q, rows, weight, scale, bias, None, float16),
        "linear_w4a8": lambda: ops.linear_w4a8(x_q, rows, weight4, multiplier, scale, bias, None, float16),
        "linear_w8a16": lambda: ops.linear_w8a16(x, weight, scale, bias),
        "linear_w4a16": lambda: ops.linear_w4a16(x, weight4, group_scale, bias),
        "conv2d_w8a8": lambda: ops.conv2d_w8a8(picture_q, one, kernel, kernel_scale, *terms, *GEOMETRY, float16),
        "conv2d_w4a8": lambda: ops.conv2d_w4a8(
            picture_q, one, kernel4, kernel_multiplier, kernel_scale, *terms, *GEOMETRY, float16
        ),
        "conv2d_w8a16": lambda: ops.conv2d_w8a16(picture, kernel, kernel_scale, terms[0], *GEOMETRY),
    }


@pytest.fixture(
    params=[
        "quantize_static",
        "quantize_per_token",
        "quantize_per_sample",
        "group_norm_silu_quantize",
        "group_norm_silu_quantize small",
        "layer_norm_quantize",
        "geglu_quantize",
        "silu_quantize",
        *(f"{layer}_{name}" for layer in ("linear", "conv2d") for name in ("w8a8", "w4a8", "w8a16")),
        "linear_w4a16",
    ]
)
def call(request: pytest.FixtureRequest, device: torch.device) -> Callable[[], Tensor]:
    """One op."""
    torch.manual_seed(0)
    return calls(device)[request.param]


def test_repeats_bit_for_bit(call: Callable[[], Tensor]) -> None:
    first = call()
    assert all(torch.equal(call(), first) for _ in range(20))


def test_a_cuda_graph_replays_it(call: Callable[[], Tensor]) -> None:
    wanted = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


def test_runs_on_the_current_stream(call: Callable[[], Tensor]) -> None:
    """A launch on another stream would not wait for the sleep, nor the event for the launch."""
    wanted = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    done = torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        out = call()
        done.record()
    assert not done.query()
    done.synchronize()
    assert torch.equal(out, wanted)


def test_more_than_2_to_31_elements(device: torch.device) -> None:
    rows, depth = 2**31 // 320 + 1000, 320
    if torch.cuda.mem_get_info(device)[0] < 16 * 2**30:
        pytest.skip("16 GiB of free memory are needed")
    x = torch.zeros(rows, depth, dtype=torch.int8, device=device)
    x[-100:] = random_int8(device, 100, depth)
    weight, ones = random_int8(device, 16, depth), torch.ones(16, device=device)
    out = ops.linear_w8a8(x, ones[:1], weight, ones, None, None, torch.float32)
    assert not out[:-100].any()
    assert torch.equal(out[-100:].cpu().long(), x[-100:].cpu().long() @ weight.cpu().long().T)


def test_more_than_2_to_31_elements_are_normalized(device: torch.device) -> None:
    """A picture of 48 MiB, and one of it repeated to 4.5 GiB: the same scales and integers at both ends."""
    if torch.cuda.mem_get_info(device)[0] < 16 * 2**30:
        pytest.skip("16 GiB of free memory are needed")
    picture = torch.randn(1, 128, 512, 384, dtype=torch.float16, device=device)
    picture = picture.contiguous(memory_format=torch.channels_last)
    wanted, scale = ops.group_norm_silu_quantize(picture, None, None, 32, 1e-5, True, None, None, False)
    many = picture.permute(0, 2, 3, 1).repeat(90, 1, 1, 1).permute(0, 3, 1, 2)
    out, scales = ops.group_norm_silu_quantize(many, None, None, 32, 1e-5, True, None, None, False)
    assert many.numel() > 2**31
    # the parts of a sample are fewer, so its sums are rounded otherwise
    assert torch.allclose(scales, scale.expand(90), rtol=1e-5)
    assert all((out[i : i + 1].int() - wanted.int()).abs().max() <= 1 for i in (0, 45, 89))
