"""Convolutions whose K is shared by several blocks: the same integers, one rounding, one order of float sums."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from ldmq_kernels.kernels.cuda import backend as cuda
from ldmq_kernels.kernels.cuda import extension, tiles
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.gpu import Gpu
from python_tests.kernels.cuda.gemm_cases import CONVOLUTIONS, ONE, image, on, tiles_of
from python_tests.kernels.operands import (
    DTYPES,
    assert_rounded_once,
    exact_conv2d,
    exact_epilogue,
    random_float8,
    random_int8,
    random_scale,
)

SAME = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)
FOUR_TAPS = ((2, 2), (1, 1), (1, 0, 0, 1), (1, 1), 1, 1)
FP8 = torch.float8_e4m3fn


def small_integers(*shape: int) -> torch.Tensor:
    """Uniform over -4..4 in e4m3: their sums are exact in any order."""
    return torch.randint(-4, 5, shape).float().to(FP8)


@tiles_of("conv2d_w8a8", "256x160|128x160x64x10|64x160|128x64|sm80 128x160|64x64")
def test_sums_are_exact(device: torch.device, tile: tiles.Tile) -> None:
    """Parts of k begin within a tap."""
    x, weight = image(random_int8(2, 144, 3, 2)), random_int8(24, 2, 2, 144)
    operands = on(device, x, ONE, weight, torch.ones(24))
    with tiles.forced(tile._replace(split_k=3)):
        out = cuda.conv2d_w8a8(*operands, None, None, None, *FOUR_TAPS, torch.float32)
    assert torch.equal(out.cpu().long(), exact_conv2d(x, weight, FOUR_TAPS))


@tiles_of("conv2d_w8a8", "sm90 128x128x128x7|sm90 128x160x64")
def test_sums_are_exact_as_early_and_as_late_as_may_be(device: torch.device, timing: None, tile: tiles.Tile) -> None:
    """With several tiles for a block, more steps than stages, and a last part of k that is shorter."""
    x, weight = image(random_int8(1, 208, 12, 12)), random_int8(72, 2, 2, 208)
    operands = on(device, x, ONE, weight, torch.ones(72))
    with tiles.forced(tile._replace(split_k=3)):
        out = cuda.conv2d_w8a8(*operands, None, None, None, *FOUR_TAPS, torch.float32)
    assert torch.equal(out.cpu().long(), exact_conv2d(x, weight, FOUR_TAPS))


def test_no_partial_sum_is_rounded(device: torch.device) -> None:
    """The first part's sum is odd and beyond 2^24, which float32 does not hold; with the second it is small."""
    x, weight = torch.full((1, 1152, 1, 2), 127, dtype=torch.int8), torch.full((8, 1, 2, 1152), 127, dtype=torch.int8)
    weight[:, 0, 0, 0] = 126
    weight[:, 0, 1] = -127
    name = "sm80 64x64x64x6"
    (tile,) = [tile for tile in tiles.candidates("conv2d_w8a8", 64, 64, 64, device) if tile.name == name]
    operands = on(device, image(x), ONE, weight, torch.ones(8))
    wide = ((1, 2), (1, 1), (0, 0, 0, 0), (1, 1), 1, 1)
    with tiles.forced(tile._replace(split_k=2)):
        out = cuda.conv2d_w8a8(*operands, None, None, None, *wide, torch.float32)
    assert (out == -127).all()


@pytest.mark.parametrize("dtype", DTYPES)
@tiles_of("conv2d_w8a8", "sm90 64x160|sm80 64x64")
def test_the_epilogue_rounds_once(device: torch.device, tile: tiles.Tile, dtype: torch.dtype) -> None:
    x, weight, weight_scale = image(random_int8(3, 32, 5, 4)), random_int8(40, 3, 3, 32), random_scale(40)
    x_scale, bias = random_scale(3), torch.randn(40).to(dtype)
    vector, residual = torch.randn(3, 40).to(dtype), image(torch.randn(3, 40, 5, 4).to(dtype))
    operands = on(device, x, x_scale, weight, weight_scale, bias, vector, residual)
    with tiles.forced(tile._replace(split_k=3)):
        out = cuda.conv2d_w8a8(*operands, *SAME, dtype)
    factors = x_scale[:, None, None, None], weight_scale[:, None, None]
    terms = (bias[:, None, None], vector[:, :, None, None], residual)
    assert_rounded_once(out.cpu(), *exact_epilogue(exact_conv2d(x, weight, SAME), *factors, terms=terms))


@tiles_of("conv2d_w8a8", "sm90 64x160")
def test_an_int8_output_is_that_of_one_block(device: torch.device, tile: tiles.Tile) -> None:
    x, weight = image(random_int8(2, 32, 5, 4)), random_int8(40, 3, 3, 32)
    operands = on(device, x, random_scale(1), weight, random_scale(40), torch.randn(40))
    inv_scale = (torch.rand(40) * 20 + 30).to(device)
    outs = []
    for split_k in (1, 4):
        with tiles.forced(tile._replace(split_k=split_k)):
            outs.append(cuda.conv2d_w8a8(*operands, None, None, *SAME, torch.int8, inv_scale))
    assert torch.equal(*outs)
    assert len(outs[0].unique()) > 20


@tiles_of("conv2d_fp8", "128x160x128|128x64|64x64")
def test_fp8_sums_of_small_integers_are_exact(device: torch.device, tile: tiles.Tile) -> None:
    shape, n, geometry = CONVOLUTIONS["uneven"]
    x, weight = image(small_integers(*shape)), small_integers(n, *geometry[0], shape[1])
    with tiles.forced(tile._replace(split_k=3)):
        out = cuda.conv2d_fp8(*on(device, x, ONE, weight, torch.ones(n)), None, None, None, *geometry, torch.float32)
    assert torch.equal(out.cpu().double(), exact_conv2d(x, weight, geometry))


@tiles_of("conv2d_fp8", "sm90 128x64|sm89 64x64")
def test_fp8_is_added_in_one_order(device: torch.device, emulated: ModuleType, tile: tiles.Tile) -> None:
    """A picture alone, again and with others, whatever block came first."""
    if device.type == "cuda":
        pytest.skip("only the emulator changes the order of blocks")
    x, weight = image(random_float8(3, 64, 6, 5)), random_float8(24, 3, 3, 64)

    def out(images: torch.Tensor, seed: int) -> torch.Tensor:
        emulated.set_seed(seed)
        try:
            with tiles.forced(tile._replace(split_k=4)):
                operands = (images, ONE, weight, torch.ones(24), None, None, None)
                return cuda.conv2d_fp8(*operands, *SAME, torch.float32)
        finally:
            emulated.set_seed(0)

    usual = out(x, 0)
    assert torch.equal(usual, out(x, 5))
    assert torch.equal(usual[:1], out(image(x[:1]), 0))


def test_split_k_fills_the_gpu_where_a_map_is_small(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """SD 1.5 at 8 by 8 and 16 by 16; a map with a tile for each multiprocessor, and linears, are not split."""
    monkeypatch.setattr(tiles, "gpu_of", lambda _: Gpu("NVIDIA H100", 90, 132))
    chosen = {m: tiles.candidates("conv2d_w8a8", m, 1280, 9 * 1280, device, taps=9)[0] for m in (128, 512, 8192)}
    assert chosen[128].split_k > chosen[512].split_k > chosen[8192].split_k == 1
    assert "split-K" in chosen[128].name
    assert {tile.split_k for tile in tiles.candidates("linear_w8a8", 128, 1280, 9 * 1280, device)} == {1}


def test_a_linear_and_missing_room_are_refused(device: torch.device) -> None:
    x, weight = image(random_int8(1, 32, 2, 2)), random_int8(8, 1, 1, 32)
    point = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 1)
    linear = tiles.candidates("linear_w8a8", 4, 8, 32, device)[0]._replace(split_k=2)
    with tiles.forced(linear), pytest.raises(Unsupported, match="split-K is for convolutions"):
        cuda.linear_w8a8(*on(device, x.flatten(2)[0].T, ONE, weight.view(8, 32), torch.ones(8)), None, None, torch.half)
    conv = tiles.candidates("conv2d_w8a8", 4, 8, 32, device)[0]._replace(split_k=65)
    with tiles.forced(conv), pytest.raises(ValueError, match="split_k is 65, must be 0 to 64"):
        cuda.conv2d_w8a8(*on(device, x, ONE, weight, torch.ones(8)), None, None, None, *point, torch.half)
    operands = {"x": 16, "weight": 16, "multiplier": 0, "x_scale": 16, "scale_count": 1, "scale_rows": 0} | {
        "weight_scale": 16, "bias": 0, "bias_dtype": "float32", "vector": 0, "vectors": 0, "residual": 0, "out": 16,
        "out_dtype": "float16", "out_inv_scale": 0, "out_inv_scale_count": 0, "m": 4, "n": 8, "channels": 32,
        "conv": (1, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 0, 0, 1), **extension.dependent_target(x),
    }  # fmt: skip
    with pytest.raises(extension.binding().Refusal, match="room for its partial sums"):
        extension.binding().run_gemm(tile=conv.place, split_k=2, partial=0, **operands)
