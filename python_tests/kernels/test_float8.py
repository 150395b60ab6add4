"""FP8 from the ops that quantize: bit for bit where int8 is, within a step of e4m3 after float sums, everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels import operands
from ldmq_kernels.kernels.agreement import AFTER_FLOAT_SUMS, EXACT
from ldmq_kernels.kernels.backend import Unsupported
from ldmq_kernels.kernels.gpu import Gpu
from ldmq_kernels.kernels.measurements import warn_once
from ldmq_kernels.numerics.formats.float8 import round_to_float8
from python_tests.kernels.operands import DTYPES, Backend, rounded_float8, scrambled

FLOAT8 = torch.float8_e4m3fn
CODES = torch.arange(127, dtype=torch.uint8)  # of the values from 0 to 448


def same(q: Tensor, wanted: Tensor) -> bool:
    return q.dtype == FLOAT8 and torch.equal(q.view(torch.uint8), wanted.view(torch.uint8))


def dynamically_rounded(y: np.ndarray, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """FP8 values and float32 scales over these axes, by numpy's IEEE float32 arithmetic."""
    scale = np.maximum(np.abs(y).max(axes, keepdims=True), np.float32(1e-12)) / np.float32(448)
    return rounded_float8(y * (np.float32(1) / scale)), torch.from_numpy(scale.squeeze(axes))


def test_every_tie_goes_to_the_even_value_and_its_neighbours_to_the_nearest() -> None:
    grid = CODES.view(FLOAT8).double()
    ties = ((grid[1:] + grid[:-1]) / 2).float()
    even = torch.where(CODES[:-1] % 2 == 0, CODES[:-1], CODES[1:])
    beside = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (0.0, 1e9)]
    for sign, bit in ((1, 0), (-1, 128)):
        for values, codes in zip((ties, *beside), (even, CODES[:-1], CODES[1:]), strict=True):
            assert torch.equal(round_to_float8(sign * values).view(torch.uint8), codes | bit)
    assert round_to_float8(torch.tensor([1e9, -torch.inf])).tolist() == [448, -448]
    assert round_to_float8(torch.tensor([torch.nan])).float().isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 70, 4, 5), (2, 32, 7, 3)])
def test_quantizers_are_the_definition_bit_for_bit(backend: Backend, dtype: torch.dtype, shape: tuple) -> None:
    x = (torch.randn(shape) * torch.logspace(-3, 2, shape[1])[:, None, None]).to(dtype)
    inv_scale, inv_smooth = torch.rand(shape[1]) * 60 + 1, torch.exp2(torch.randint(-3, 4, shape[1:2]).float())
    inv_scale[0] = 0.01  # below the subnormal ones
    wanted = rounded_float8(x.float().numpy() * inv_scale.numpy()[:, None, None])
    assert same(backend.call("quantize_static", scrambled(x), inv_scale, 1, FLOAT8), wanted)
    y = x.float().numpy() * inv_smooth.numpy()[:, None, None]
    for op, given, axes, order in (
        ("quantize_per_sample", x, (1, 2, 3), (0, 1, 2, 3)),
        ("quantize_per_token", x.permute(0, 2, 3, 1), (-1,), (0, 2, 3, 1)),
    ):
        for smoothed, product in ((inv_smooth, y), (None, x.float().numpy())):
            wanted_q, wanted_scale = dynamically_rounded(product.transpose(order), axes)
            q, scale = backend.call(op, given, smoothed, FLOAT8)
            assert same(q, wanted_q)
            assert torch.equal(scale, wanted_scale)


def test_what_is_too_large_is_448_and_nan_stays_nan(backend: Backend) -> None:
    x = torch.tensor([1e30, -torch.inf, 448.0, 465.0, -0.0, 2.0**-10, torch.nan])
    q = backend.call("quantize_static", x, torch.ones(1), -1, FLOAT8).float()
    assert q[:-1].tolist() == [448, -448, 448, 448, 0, 0]  # half of the least subnormal value is a tie
    if not (backend.name == "triton" and backend.device.type == "cpu" and not q[-1].isnan()):
        assert q[-1].isnan()


def test_a_row_of_zeros_has_a_positive_scale(backend: Backend) -> None:
    q, scale = backend.call("quantize_per_token", torch.zeros(2, 20), None, FLOAT8)
    assert not q.float().any()
    assert (scale > 0).all()


def _silu(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x)


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * torch.nn.functional.gelu(gate)


NORMED = torch.nn.functional.layer_norm
PRODUCERS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[Any, ...], tuple[Any, ...]]] = {
    "silu_quantize": (_silu, (), ()),
    "gelu_quantize": (torch.nn.functional.gelu, (False,), ()),
    "geglu_quantize": (_geglu, (), ()),
    "layer_norm_quantize": (lambda x: NORMED(x, x.shape[-1:]), (None, None, 1e-5), (None, None)),
}


def check_producer(backend: Backend, op: str, y: Tensor, before: tuple, after: tuple, is_static: bool) -> None:
    """Call a producer of which y (..., C) float64 is the exact output; within one step, and nearly always none."""
    factor = 300 / y.abs().amax().float().view(1) if is_static else torch.exp2(torch.arange(y.shape[-1]) % 3 - 1.0)
    given = (factor, None) if is_static else (None, factor)
    q, scale = backend.call(op, *before, *given, *after, FLOAT8)
    if op == "group_norm_silu_quantize":
        q = q.permute(0, 2, 3, 1)
    product = y * factor.double()
    if not is_static:
        axes = (-1,) if scale.dim() == y.dim() - 1 else tuple(range(1, y.dim()))
        wanted = product.abs().amax(axes) / 448
        torch.testing.assert_close(scale.double(), wanted, rtol=1e-5, atol=0)
        product = product / wanted.view(*wanted.shape, *[1] * (y.dim() - wanted.dim()))
    rounded = rounded_float8(product.float().numpy())
    assert not AFTER_FLOAT_SUMS.difference((q, scale), (rounded, scale))
    assert (q.view(torch.uint8) == rounded.view(torch.uint8)).float().mean() > 0.99


@pytest.mark.parametrize("op", PRODUCERS)
@pytest.mark.parametrize("is_static", [True, False], ids=["static", "measured"])
def test_producers_round_what_they_compute(backend: Backend, op: str, is_static: bool) -> None:
    function, before, after = PRODUCERS[op]
    x = torch.randn(3, 17, 80)
    check_producer(backend, op, function(x.double()), (x, *before), after, is_static)


@pytest.mark.parametrize("mode", ["static", "per sample", "per token"])
@pytest.mark.parametrize("shape", [(2, 32, 5, 3), (1, 16, 40, 40)], ids=["one launch", "two launches"])
def test_group_norm_rounds_what_it_computes(backend: Backend, shape: tuple, mode: str) -> None:
    x = torch.randn(shape)
    y = _silu(torch.nn.functional.group_norm(x.double(), 4)).permute(0, 2, 3, 1)
    after = (mode == "per token",)
    before = x, None, None, 4, 1e-5, True
    check_producer(backend, "group_norm_silu_quantize", y, before, after, mode == "static")


QUANTIZERS: dict[str, tuple[Any, ...]] = {
    "quantize_static": (torch.ones(1), 1),
    "quantize_per_token": (None,),
    "quantize_per_sample": (None,),
    "silu_quantize": (None, None),
    "group_norm_silu_quantize": (None, None, 4, 1e-5, True, None, None, False),
}


@pytest.mark.parametrize("op", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16])
def test_what_is_neither_int8_nor_e4m3_is_refused(backend: Backend, op: str, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=f"{op}.*{dtype} is asked for"):
        backend.call(op, torch.randn(1, 8, 3, 2), *QUANTIZERS[op], dtype)


def test_a_gpu_below_8_9_is_told_of_once_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device, found = torch.device("cuda", 0), Gpu("NVIDIA A100", 80, 108)
    monkeypatch.setattr(operands, "gpu_of", lambda _: found)
    warn_once.cache_clear()
    with (
        pytest.warns(UserWarning, match="FP8 layers run by their definition on cuda:0.*choose w8a8"),
        pytest.raises(Unsupported, match=r"FP8 needs compute capability 8\.9 or newer, this is 8\.0"),
    ):
        operands.check_float8(device)
    found = found._replace(capability=89)
    operands.check_float8(device)


def test_agreement_counts_steps_of_e4m3_and_takes_no_nan() -> None:
    values = CODES.view(FLOAT8)
    following, negative = CODES[1:].view(FLOAT8), (CODES | 128).view(FLOAT8)
    assert not AFTER_FLOAT_SUMS.difference(following, values[:-1])
    assert "differs by up to 1, 0 is allowed" in EXACT.difference(following, values[:-1])
    assert not EXACT.difference(negative[:1], values[:1])
    assert "differs by up to 252" in AFTER_FLOAT_SUMS.difference(negative, values)
    assert AFTER_FLOAT_SUMS.difference(torch.tensor([torch.nan]).to(FLOAT8), values[-1:])
