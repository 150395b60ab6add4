"""Every tile of the int8 GEMMs: exact integers, one rounding."""

from __future__ import annotations

import pytest
import torch

from ldmq_kernels.kernels.cuda import backend as cuda
from ldmq_kernels.kernels.cuda import extension, tiles
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.numerics.formats.int4 import pack_int4
from python_tests.kernels.cuda.gemm_cases import CONVOLUTIONS, NAMES, ONE, UPSAMPLED, image, on, tiles_of
from python_tests.kernels.operands import (
    DTYPES,
    assert_rounded_once,
    exact_conv2d,
    exact_epilogue,
    exact_linear,
    folded,
    random_int4,
    random_int8,
    random_multiplier,
    random_scale,
)


def test_the_extension_has_these_tiles(device: torch.device) -> None:
    built = {(tile.op, tile.name) for tile in (tiles.Tile(0, *fields) for fields in extension.binding().tiles())}
    families = {tile[1] for tile in extension.binding().tiles()}
    wanted = {(op, name) for op, names in NAMES.items() for name in names if int(name[2:4]) in families}
    assert built == wanted


@tiles_of("linear_w8a8")
@pytest.mark.parametrize("several_tiles", [False, True])
def test_linear_sums_are_exact(device: torch.device, timing: None, tile: tiles.Tile, several_tiles: bool) -> None:
    m, n, k = (2 * tile.m + 33, tile.n + 72, 144) if several_tiles else (17, 168, 320)
    x, weight = random_int8(m, k), random_int8(n, k)
    operands = on(device, x, ONE, weight, torch.ones(n))
    out = cuda.linear_w8a8(*operands, None, None, torch.float32)
    assert torch.equal(out.cpu().long(), exact_linear(x, weight))


@tiles_of("linear_w4a8")
@pytest.mark.parametrize("several_tiles", [False, True])
def test_int4_sums_are_exact(device: torch.device, timing: None, tile: tiles.Tile, several_tiles: bool) -> None:
    m, n, k = (2 * tile.m + 33, tile.n + 40, 160) if several_tiles else (17, 168, 320)
    x, weight, multiplier = random_int8(m, k), random_int4(n, k), random_multiplier(n, k)
    operands = on(device, x, ONE, pack_int4(weight), multiplier, torch.ones(n))
    out = cuda.linear_w4a8(*operands, None, None, torch.float32)
    assert torch.equal(out.cpu().long(), exact_linear(x, folded(weight, multiplier)))


@tiles_of("linear_w8a8", r"sm90 (?!.*cooperative)")
@pytest.mark.parametrize("slow", [0, 3])
def test_warpgroups_take_turns_though_a_warp_is_slow(device: torch.device, tile: tiles.Tile, slow: int) -> None:
    """Tiles of one step: a warp that has not begun its turn must not be two turns behind the others."""
    if device.type == "cuda":
        pytest.skip("only the emulator slows a warp")
    x, weight = random_int8(1300, 32), random_int8(168, 32)
    extension.binding().set_slow_warp(slow)
    try:
        out = cuda.linear_w8a8(x, ONE, weight, torch.ones(168), None, None, torch.float32)
    finally:
        extension.binding().set_slow_warp(-1)
    assert torch.equal(out.long(), exact_linear(x, weight))


@tiles_of("linear_w4a8")
def test_unit_vectors_read_every_int4_with_every_multiplier(device: torch.device, tile: tiles.Tile) -> None:
    weight = torch.arange(-7, 8).repeat(18 * 128)[: 18 * 128].view(18, 128).to(torch.int8).repeat(4, 1)
    weight = torch.stack([row.roll(index) for index, row in enumerate(weight)])
    multiplier = torch.arange(1, 19, dtype=torch.uint8).repeat(4)[:, None].expand(-1, 2).contiguous()
    operands = on(device, torch.eye(128, dtype=torch.int8), ONE, pack_int4(weight), multiplier, torch.ones(72))
    out = cuda.linear_w4a8(*operands, None, None, torch.float32)
    assert torch.equal(out.cpu().long(), folded(weight, multiplier).T)


@tiles_of("conv2d_w8a8")
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_sums_are_exact(device: torch.device, timing: None, tile: tiles.Tile, case: str) -> None:
    shape, n, geometry = CONVOLUTIONS[case]
    x, weight = image(random_int8(*shape)), random_int8(n, *geometry[0], shape[1])
    operands = on(device, x, ONE, weight, torch.ones(n))
    out = cuda.conv2d_w8a8(*operands, None, None, None, *geometry, torch.float32)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out.cpu().long(), exact_conv2d(x, weight, geometry))


@tiles_of("conv2d_w8a8")
def test_convolution_of_an_enlarged_input(device: torch.device, tile: tiles.Tile) -> None:
    shape, n, geometry = UPSAMPLED
    x, weight = image(random_int8(*shape)), random_int8(n, *geometry[0], shape[1])
    operands = on(device, x, ONE, weight, torch.ones(n))
    call = lambda: cuda.conv2d_w8a8(*operands, None, None, None, *geometry, torch.float32)  # noqa: E731
    if tile.family == tiles.HOPPER:
        with pytest.raises(Unsupported, match="TMA does not enlarge its input"):
            call()
    else:
        assert torch.equal(call().cpu().long(), exact_conv2d(x, weight, geometry))


def test_what_hopper_refuses_goes_to_a_tile_for_every_gpu(device: torch.device) -> None:
    shape, n, geometry = UPSAMPLED
    x, weight = image(random_int8(*shape)), random_int8(n, *geometry[0], shape[1])
    operands = on(device, x, ONE, weight, torch.ones(n))
    out = cuda.conv2d_w8a8(*operands, None, None, None, *geometry, torch.float32)
    assert torch.equal(out.cpu().long(), exact_conv2d(x, weight, geometry))


@pytest.mark.parametrize("sign", [1, -1])
@tiles_of("linear_w8a8")
def test_no_sum_of_extremes_saturates(device: torch.device, tile: tiles.Tile, sign: int) -> None:
    x, weight = torch.full((3, 960), 127, dtype=torch.int8), torch.full((24, 960), sign * 127, dtype=torch.int8)
    operands = on(device, x, ONE, weight, torch.ones(24))
    out = cuda.linear_w8a8(*operands, None, None, torch.float32)
    assert (out == sign * 960 * 127 * 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("op", ["linear_w8a8", "linear_w4a8"])
def test_linear_epilogue_rounds_once(
    device: torch.device, op: str, dtype: torch.dtype, bias_dtype: torch.dtype | None, per_token: bool
) -> None:
    x, weight, weight_scale = random_int8(2, 35, 96), random_int4(72, 96), random_scale(72)
    x_scale = random_scale(2, 35) if per_token else random_scale(1)
    bias = None if bias_dtype is None else torch.randn(72).to(bias_dtype)
    residual = torch.randn(2, 35, 72).to(dtype) if per_token else None
    multiplier = random_multiplier(72, 96)
    weights = (weight,) if op == "linear_w8a8" else (pack_int4(weight), multiplier)
    out = getattr(cuda, op)(*on(device, x, x_scale, *weights, weight_scale, bias, residual), dtype)
    sums = exact_linear(x, weight if op == "linear_w8a8" else folded(weight, multiplier))
    factors = x_scale.unsqueeze(-1), weight_scale
    assert_rounded_once(out.cpu(), *exact_epilogue(sums, *factors, terms=(bias, residual)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("upsample", [1, 2])
def test_convolution_epilogue_rounds_once(
    device: torch.device, dtype: torch.dtype, per_sample: bool, upsample: int
) -> None:
    geometry = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, upsample)
    x, weight, weight_scale = image(random_int8(3, 32, 5, 4)), random_int8(40, 3, 3, 32), random_scale(40)
    x_scale, bias = random_scale(3 if per_sample else 1), torch.randn(40).to(dtype)
    vector, residual = torch.randn(3, 40).to(dtype), image(torch.randn(3, 40, 5 * upsample, 4 * upsample).to(dtype))
    operands = on(device, x, x_scale, weight, weight_scale, bias, vector, residual)
    out = cuda.conv2d_w8a8(*operands, *geometry, dtype)
    factors = x_scale[:, None, None, None], weight_scale[:, None, None]
    terms = (bias[:, None, None], vector[:, :, None, None], residual)
    assert_rounded_once(out.cpu(), *exact_epilogue(exact_conv2d(x, weight, geometry), *factors, terms=terms))


@pytest.mark.parametrize("per_channel", [False, True])
def test_an_output_is_quantized_for_the_next_layer(device: torch.device, per_channel: bool) -> None:
    x, weight, bias = random_int8(70, 64), random_int8(48, 64), torch.randn(48)
    x_scale, weight_scale = random_scale(70), random_scale(48)
    inv_scale = torch.rand(48 if per_channel else 1) * 20 + 30
    operands = on(device, x, x_scale, weight, weight_scale, bias)
    out = cuda.linear_w8a8(*operands, None, torch.int8, out_inv_scale=inv_scale.to(device))
    value = (exact_linear(x, weight).double() * x_scale[:, None] * weight_scale + bias) * inv_scale
    wanted = value.round().clamp(-127, 127)
    assert (wanted.abs() == 127).any()
    assert (wanted.abs() < 127).any()
    ties = (value - value.floor() - 0.5).abs() < 1e-3
    assert torch.equal(out.cpu().double()[~ties], wanted[~ties])
    assert out.dtype == torch.int8


def test_a_static_linear_is_its_two_halves(device: torch.device) -> None:
    x, inv_scale, scale = torch.randn(33, 64), torch.rand(64) * 40 + 1, random_scale(1)
    weight, weight_scale = random_int8(24, 64), random_scale(24)
    operands = on(device, x, inv_scale, scale, weight, weight_scale)
    out = cuda.linear_static_w8a8(*operands, None, None)
    x_q = cuda.quantize_static(operands[0], operands[1], -1)
    assert torch.equal(out, cuda.linear_w8a8(x_q, *operands[2:], None, None, torch.float32))


def test_nothing_is_launched_for_nothing(device: torch.device) -> None:
    weight, scale = random_int8(8, 32).to(device), torch.ones(8, device=device)
    none = torch.empty(0, 32, dtype=torch.int8, device=device)
    assert cuda.linear_w8a8(none, ONE.to(device), weight, scale, None, None, torch.float16).shape == (0, 8)
    no_images = image(torch.empty(0, 32, 4, 4, dtype=torch.int8, device=device))
    geometry = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 1)
    out = cuda.conv2d_w8a8(
        no_images, ONE.to(device), weight.view(8, 1, 1, 32), scale, None, None, None, *geometry, torch.float16
    )
    assert out.shape == (0, 8, 4, 4)
