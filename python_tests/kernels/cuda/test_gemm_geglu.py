"""Every tile of GEGLU: each value by its own gate, in one rounding to what the next layer takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels.agreement import AFTER_FLOAT8_SUMS, AFTER_FLOAT_SUMS
from ldmq_kernels.kernels.cuda import backend as cuda
from ldmq_kernels.kernels.cuda import gemm, tiles
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.reference import backend as reference
from python_tests.kernels.cuda.gemm_cases import ONE, on, tiles_of
from python_tests.kernels.operands import exact_linear, random_float8, random_int8, random_scale

FP8 = torch.float8_e4m3fn
COLUMNS = 72  # of the output


def gated(columns: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight of values and of gates that read one channel, its scales, and the gates of an input of 10 there."""
    gates = torch.zeros(columns, weight.shape[1], dtype=weight.dtype)
    gates[:, 0] = 1
    of_gate = 1.0 + torch.arange(columns) % 20
    return torch.cat([weight, gates]), torch.cat([torch.ones(columns), of_gate]), 10 * of_gate.long()


@tiles_of("linear_geglu_w8a8")
def test_each_value_meets_its_own_gate(device: torch.device, timing: None, tile: tiles.Tile) -> None:
    """GELU hands on gates of 10 to 200, which are different in neighbouring columns."""
    rows, columns, depth = tile.cluster * tile.m + 33, tile.n // 2 + 40, 144
    x = random_int8(rows, depth)
    x[:, 0] = 10
    weight, scale, gates = gated(columns, random_int8(columns, depth).sign())
    out = cuda.linear_geglu_w8a8(*on(device, x, ONE, weight, scale), None, None, torch.float32)
    assert torch.equal(out.cpu().long(), exact_linear(x, weight[:columns]) * gates)


@tiles_of("linear_geglu_fp8")
def test_each_fp8_value_meets_its_own_gate(device: torch.device, timing: None, tile: tiles.Tile) -> None:
    rows, columns, depth = tile.cluster * tile.m + 33, tile.n // 2 + 40, 144
    x = torch.randint(-2, 3, (rows, depth)).float()
    x[:, 0] = 10
    weight, scale, gates = gated(columns, torch.randint(-1, 2, (columns, depth)).float())
    operands = on(device, x.to(FP8), ONE, weight.to(FP8), scale)
    out = cuda.linear_geglu_fp8(*operands, None, None, torch.float32)
    assert torch.equal(out.cpu().long(), exact_linear(x.long(), weight[:columns].long()) * gates)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, FP8])
@pytest.mark.parametrize("op", ["linear_geglu_w8a8", "linear_geglu_fp8"])
def test_the_epilogue_is_the_definitions(device: torch.device, op: str, out_dtype: torch.dtype) -> None:
    """Scales of rows and of columns, a bias, and an inverse scale for each channel of the output."""
    check(device, op, out_dtype, torch.float16, torch.rand(COLUMNS) * 20 + 10)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
def test_the_bias_is_of_any_dtype(device: torch.device, bias_dtype: torch.dtype | None) -> None:
    check(device, "linear_geglu_w8a8", torch.float16, bias_dtype, ONE)


@pytest.mark.parametrize("out_dtype", [torch.int8, FP8])
def test_all_channels_may_share_an_inverse_scale(device: torch.device, out_dtype: torch.dtype) -> None:
    """By which many values are clamped, at both ends."""
    out = check(device, "linear_geglu_w8a8", out_dtype, torch.float32, torch.tensor([70.0]))
    largest = 127 if out_dtype == torch.int8 else torch.finfo(FP8).max
    assert (float(out.min()), float(out.max())) == (-largest, largest)


def check(
    device: torch.device, op: str, out_dtype: torch.dtype, bias_dtype: torch.dtype | None, inv_scale: Tensor
) -> Tensor:
    """What a call gives, compared with the definition; only a quantized output has an inverse scale."""
    make = random_int8 if op.endswith("w8a8") else random_float8
    x, weight = make(2, 35, 96), make(2 * COLUMNS, 96)
    bias = None if bias_dtype is None else torch.randn(2 * COLUMNS).to(bias_dtype)
    to = inv_scale if out_dtype in (torch.int8, FP8) else None
    operands = x, random_scale(2, 35), weight, random_scale(2 * COLUMNS), bias, to
    out = getattr(cuda, op)(*on(device, *operands), out_dtype).cpu()
    wanted = getattr(reference, op)(*operands, out_dtype)
    agreement = AFTER_FLOAT_SUMS if op.endswith("w8a8") else AFTER_FLOAT8_SUMS
    assert not agreement.difference(out, wanted)
    assert float(wanted.float().abs().max()) > 5
    return out.float()


def test_what_the_epilogue_does_not_have_is_refused(device: torch.device) -> None:
    x, weight = random_int8(4, 32).to(device), random_int8(32, 32).to(device)
    scale, residual = torch.ones(32, device=device), torch.zeros(4, 16, dtype=torch.float16, device=device)
    epilogue = gemm.Epilogue(ONE.to(device), scale, residual=residual)
    with pytest.raises(Unsupported, match="GEGLU and an int8 output take no residual"):
        gemm.linear("linear_geglu_w8a8", x, weight, torch.int8, epilogue, torch.float16)
    with pytest.raises(Unsupported, match="output channels must be a multiple of 8"):
        cuda.linear_geglu_w8a8(x, ONE.to(device), weight[:24], scale[:24], None, None, torch.float16)
    with pytest.raises(Unsupported, match="an FP8 output is for GEGLU"):
        gemm.linear("linear_w8a8", x, weight, torch.int8, gemm.Epilogue(ONE, scale, out_inv_scale=ONE), FP8)
