"""Every tile of the FP8 GEMMs: exact where the tensor cores are, promoted to float32, one rounding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels import operands as checks
from ldmq_kernels.kernels.agreement import Agreement
from ldmq_kernels.kernels.cuda import backend as cuda
from ldmq_kernels.kernels.cuda import extension, gemm, tiles
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.gpu import Gpu
from python_tests.kernels.cuda.gemm_cases import CONVOLUTIONS, ONE, UPSAMPLED, image, on, tiles_of
from python_tests.kernels.operands import (
    assert_rounded_once,
    exact_conv2d,
    exact_epilogue,
    exact_linear,
    random_float8,
    random_scale,
)

FP8 = torch.float8_e4m3fn
PROMOTED = Agreement(sum_tolerance=2.0**-9)  # what 14 bits lose of 128 products, whatever K is


def small_integers(*shape: int) -> Tensor:
    """Uniform over -4..4: 128 products of them, and their sums, have at most 11 bits."""
    return torch.randint(-4, 5, shape).float().to(FP8)


@tiles_of("linear_fp8")
def test_linear_sums_of_small_integers_are_exact(device: torch.device, timing: None, tile: tiles.Tile) -> None:
    m, n, k = 2 * tile.m + 33, 24, 2 * tile.k + 16
    x, weight = small_integers(m, k), small_integers(n, k)
    out = cuda.linear_fp8(*on(device, x, ONE, weight, torch.ones(n)), None, None, torch.float32)
    assert torch.equal(out.cpu().double(), exact_linear(x, weight))


@tiles_of("conv2d_fp8")
def test_convolution_sums_of_small_integers_are_exact(device: torch.device, tile: tiles.Tile) -> None:
    shape, n, geometry = CONVOLUTIONS["uneven"]
    x, weight = image(small_integers(*shape)), small_integers(n, *geometry[0], shape[1])
    out = cuda.conv2d_fp8(*on(device, x, ONE, weight, torch.ones(n)), None, None, None, *geometry, torch.float32)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out.cpu().double(), exact_conv2d(x, weight, geometry))


def test_what_hopper_refuses_goes_to_a_tile_of_mma(device: torch.device) -> None:
    shape, n, geometry = UPSAMPLED
    x, weight = image(small_integers(*shape)), small_integers(n, *geometry[0], shape[1])
    out = cuda.conv2d_fp8(*on(device, x, ONE, weight, torch.ones(n)), None, None, None, *geometry, torch.float32)
    assert torch.equal(out.cpu().double(), exact_conv2d(x, weight, geometry))


@tiles_of("linear_fp8", "128x64|64x64|256x128")
def test_sums_are_promoted_before_they_lose_small_terms(device: torch.device, tile: tiles.Tile) -> None:
    """14 bits of 2^17 end at 16, so ones that are added to it are lost: those of its own step, and no others."""
    x = torch.ones(1, 512)
    x[:, 0] = 448
    weight = x.expand(8, -1)
    out = cuda.linear_fp8(*on(device, x.to(FP8), ONE, weight.to(FP8), torch.ones(8)), None, None, torch.float32)
    assert (out.cpu() > 448**2 + 511 - 128).all()
    assert (out.cpu() <= 448**2 + 511).all()


@tiles_of("linear_fp8", "128x160x64|64x64")
def test_unit_vectors_read_every_number(device: torch.device, tile: tiles.Tile) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    bits[[0x7F, 0xFF]] = 0
    weight = torch.stack([bits.roll(i)[:128] for i in range(0, 256, 8)])
    weight[3, 5], weight[4, 127] = 0x7F, 0xFF
    weight = weight.view(FP8)
    out = cuda.linear_fp8(*on(device, torch.eye(128).to(FP8), ONE, weight, torch.ones(32)), None, None, torch.float32)
    assert out.cpu().T[3:5].isnan().all()  # zeros times NaN are NaN, too
    assert torch.equal(out.cpu().T[5:], weight.float()[5:])
    assert torch.equal(out.cpu().T[:3], weight.float()[:3])


@tiles_of("linear_fp8", " 128x128x128|64x64")
def test_random_sums_agree(device: torch.device, tile: tiles.Tile) -> None:
    x, weight = random_float8(17, 400), random_float8(168, 400)
    out = cuda.linear_fp8(*on(device, x, ONE, weight, torch.ones(168)), None, None, torch.float32)
    assert not PROMOTED.difference(out.cpu(), exact_linear(x, weight).float())


@tiles_of("linear_fp8", " 128x128x128|64x64")
def test_linear_epilogue_rounds_once(device: torch.device, tile: tiles.Tile) -> None:
    x, weight, weight_scale = small_integers(2, 35, 96), small_integers(72, 96), random_scale(72)
    x_scale, bias, residual = random_scale(2, 35), torch.randn(72), torch.randn(2, 35, 72).half()
    out = cuda.linear_fp8(*on(device, x, x_scale, weight, weight_scale, bias, residual), torch.float16)
    exact = exact_epilogue(exact_linear(x, weight), x_scale.unsqueeze(-1), weight_scale, terms=(bias, residual))
    assert_rounded_once(out.cpu(), *exact)


@tiles_of("conv2d_fp8", "128x64|64x64")
def test_convolution_epilogue_rounds_once(device: torch.device, tile: tiles.Tile) -> None:
    geometry = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)
    x, weight, weight_scale = image(small_integers(3, 32, 5, 4)), small_integers(40, 3, 3, 32), random_scale(40)
    x_scale, bias, vector = random_scale(3), torch.randn(40), torch.randn(3, 40).bfloat16()
    residual = image(torch.randn(3, 40, 5, 4).bfloat16())
    operands = on(device, x, x_scale, weight, weight_scale, bias, vector, residual)
    out = cuda.conv2d_fp8(*operands, *geometry, torch.bfloat16)
    factors = x_scale[:, None, None, None], weight_scale[:, None, None]
    terms = (bias[:, None, None], vector[:, :, None, None], residual)
    assert_rounded_once(out.cpu(), *exact_epilogue(exact_conv2d(x, weight, geometry), *factors, terms=terms))


def linear(device: torch.device, x: Tensor, weight: Tensor, **epilogue: Tensor) -> Tensor:
    x, weight, one, ones = on(device, x, weight, ONE, torch.ones(8))
    return gemm.linear("linear_fp8", x, weight, FP8, gemm.Epilogue(one, ones, **epilogue), torch.int8)


def test_what_the_kernels_cannot_take_is_refused(device: torch.device) -> None:
    x, weight = small_integers(4, 32), small_integers(8, 32)
    with pytest.raises(Unsupported, match=r"activations are torch.int8; this kernel takes torch.float8_e4m3fn"):
        linear(device, x.view(torch.int8), weight)
    with pytest.raises(Unsupported, match=r"weight is torch.int8"):
        linear(device, x, weight.view(torch.int8))
    with pytest.raises(Unsupported, match=r"linear_fp8 of .*an int8 output is for int8 operands"):
        linear(device, x, weight, out_inv_scale=ONE.to(device))


def test_a_gpu_without_fp8_is_left_to_the_next_backend(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "gpu_of", lambda _: Gpu("NVIDIA A100", 80, 108))
    monkeypatch.setattr(checks, "warn_once", lambda _: None)
    with pytest.raises(Unsupported, match=r"FP8 needs compute capability 8.9 or newer, this is 8.0"):
        cuda.linear_fp8(small_integers(4, 32).to(device), ONE, None, ONE, None, None, torch.float16)


@pytest.mark.parametrize(("architectures", "families"), [("80;89;90a", {89}), ("80", set()), ("80;90a", set())])
def test_fp8_takes_the_tiles_whose_code_this_gpu_runs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, architectures: str, families: set[int]
) -> None:
    """A build for 80 and 90 runs on 8.9 by the PTX of 80, which has none of FP8's instructions."""
    monkeypatch.setattr(tiles, "gpu_of", lambda _: Gpu("NVIDIA L40S", 89, 142))
    built = SimpleNamespace(tiles=extension.binding().tiles, architectures=lambda: architectures)
    monkeypatch.setattr(extension, "binding", lambda: built)
    assert {tile.family for tile in tiles.candidates("linear_fp8", 64, 64, 64, device)} == families
    assert {tile.family for tile in tiles.candidates("linear_w8a8", 64, 64, 64, device)} == {80}
