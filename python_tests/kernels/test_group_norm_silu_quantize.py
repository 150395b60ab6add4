"""group_norm_silu_quantize is GroupNorm, SiLU and quantization in float32, but for one step near a tie, everywhere."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from python_tests.kernels.operands import DTYPES, FEW_EXAMPLES, Backend, scrambled
from python_tests.kernels.producers import EPS, MODES, STATIC, TIES, assert_quantized, factors, is_torch, rounding

NORM_EPS = 1e-5
DIP_AT, DIP = -1.278464542761, 0.278464542761  # where SiLU is least, and its value there
OP = "group_norm_silu_quantize"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def sample_bound(normed: Tensor, factor: Tensor, with_silu: bool) -> Tensor:
    """The largest value that a channel's extremes allow, times its factor; (N,) of (N, H, W, C) float64."""
    low, high = normed.amin((1, 2)), normed.amax((1, 2))
    if not with_silu:
        return (torch.maximum(low.abs(), high.abs()) * factor).amax(1)
    bound = torch.maximum(silu(low).abs(), silu(high).abs())
    bound = torch.where((low < DIP_AT) & (high > DIP_AT), bound.clamp_min(DIP), bound)
    return (bound * factor).amax(1)


def check(
    backend: Backend,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mode: str,
    with_silu: bool = True,
    per_token: bool = False,
    ties: float = TIES,
) -> None:
    """x is (N, C, H, W); the exact results are (N, H, W, C)."""
    grouped = x.double().permute(0, 2, 3, 1).unflatten(-1, (groups, -1))
    mean = grouped.mean((1, 2, 4), keepdim=True)
    deviation = (grouped.var((1, 2, 4), unbiased=False, keepdim=True) + NORM_EPS).sqrt()
    weight64, bias64 = (torch.full((x.shape[1],), one) if v is None else v for one, v in ((1.0, weight), (0.0, bias)))
    weight64, bias64 = weight64.double(), bias64.double()
    normed = ((grouped - mean) / deviation).flatten(-2) * weight64 + bias64
    y = silu(normed) if with_silu else normed
    # the mean is itself a float32, so x - mean is off by its rounding
    error = ((grouped.abs() + mean.abs()) / deviation).flatten(-2) * weight64.abs() + normed.abs() + bias64.abs()
    error = 8 * EPS * (error + y.abs() * normed.abs()) + rounding(backend, x.dtype, normed, bias64, y)
    inv_scale, inv_smooth = factors(mode, y)
    arguments = x, weight, bias, groups, NORM_EPS, with_silu, inv_scale, inv_smooth, per_token
    q, scale = backend.call(OP, *arguments)
    bound = None
    if inv_scale is None and not per_token:
        factor = torch.ones(()).double() if inv_smooth is None else inv_smooth.double()
        bound = sample_bound(normed, factor, with_silu).view(-1, 1, 1)
        scale = scale.view(-1, 1, 1)
    assert_quantized(backend, q.permute(0, 2, 3, 1), scale, y, error, inv_scale, inv_smooth, bound, ties)


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A picture whose samples and channels differ in size, a weight of both signs, a bias."""
    x = torch.randn(shape) * torch.logspace(-1, 1, shape[1])[torch.randperm(shape[1]), None, None] + 0.5
    x = x * torch.arange(1, shape[0] + 1)[:, None, None, None]
    return x.to(dtype), torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)


SMALL = [((2, 20, 17, 5), 4), ((1, 4, 63, 2), 2)]
WIDE = [
    ((2, 320, 5, 1), 32, torch.float16, "inv_scales"),
    ((1, 320, 5, 1), 32, torch.float16, "smoothed"),
    ((1, 960, 3, 3), 32, torch.bfloat16, "one inv_scale"),
    ((1, 960, 3, 1), 32, torch.bfloat16, "measured"),
    ((1, 2560, 1, 2), 32, torch.float32, "inv_scales"),
    ((1, 2560, 1, 2), 32, torch.float32, "measured"),
]


@pytest.mark.parametrize(  # a dtype is only loaded, and more channels are more of the same: all of both on a small map
    ("shape", "groups", "dtype", "mode"),
    [
        *((*SMALL[0], torch.float16, mode) for mode in MODES),
        *((*SMALL[1], dtype, mode) for dtype in DTYPES for mode in MODES),
        *WIDE,
    ],
)
def test_is_the_definition(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], groups: int, mode: str
) -> None:
    x, weight, bias = operands(shape, dtype)
    check(backend, x, groups, weight, bias, mode)
    check(backend, scrambled(x), groups, weight, None, mode, with_silu=False)
    if mode not in STATIC:
        x = x.contiguous(memory_format=torch.channels_last)
        check(backend, x, groups, None, bias, mode, per_token=True)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Triton with the kernels for large maps, several steps to a part and to the merge, on small maps."""
    producer = importlib.import_module(f"ldmq_kernels.kernels.triton.{OP}")
    samples = importlib.import_module("ldmq_kernels.kernels.triton.samples")
    monkeypatch.setattr(producer, "SLAB_ELEMENTS", 0)
    monkeypatch.setattr(producer, "MERGE_ELEMENTS", 32)
    monkeypatch.setattr(samples, "PART_PROGRAMS", 6)
    monkeypatch.setattr(samples, "PART_ELEMENTS", 256)
    return Backend("triton", torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@needs_triton
@pytest.mark.gpu_kernels
@pytest.mark.parametrize(  # a dtype is only loaded: one a shape
    ("shape", "groups", "dtype"),
    [
        ((2, 20, 17, 9), 4, torch.float16),
        ((1, 96, 5, 5), 32, torch.bfloat16),
        ((2, 192, 1, 1), 2, torch.float32),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_parts_of_a_map_are_merged(
    in_parts: Backend, dtype: torch.dtype, shape: tuple[int, ...], groups: int, mode: str
) -> None:
    x, weight, bias = operands(shape, dtype)
    check(in_parts, x, groups, weight, bias, mode)
    check(in_parts, scrambled(x), groups, None, None, mode, with_silu=False)
    if mode not in STATIC:
        check(in_parts, x, groups, weight, bias, mode, per_token=True)


@needs_triton
@pytest.mark.gpu_kernels
def test_parts_of_a_small_variance_about_a_large_mean(in_parts: Backend) -> None:
    check(in_parts, torch.randn(2, 20, 17, 9) + 512, 4, None, None, "measured", per_token=True, ties=0.2)


@pytest.mark.parametrize("size", [2, 63])
def test_a_small_variance_about_a_large_mean_is_found(backend: Backend, size: int) -> None:
    """The mean of the squares less the square of the mean would have no digit of it."""
    check(backend, torch.randn(1, 16, size, size) + 512, 2, None, None, "one inv_scale", ties=0.2)


def test_a_map_larger_than_one_program_reads(backend: Backend) -> None:
    x, weight, bias = operands((1, 8, 130, 131), torch.float16)
    check(backend, x, 2, weight, bias, "inv_scales")
    check(backend, x, 2, weight, bias, "smoothed")


@pytest.mark.parametrize("sign", [1, -1])
def test_the_scale_of_a_sample_within_the_dip_of_silu_is_that_of_the_dip(backend: Backend, sign: int) -> None:
    """Its extremes allow the dip, whether or not a pixel is there."""
    if is_torch(backend, torch.float32):
        pytest.skip("in torch the CPU measures the largest absolute value itself")
    x = torch.tensor([-1.0, 1.0, 1.0, -1.0]).view(1, 1, 2, 2).expand(2, 4, 2, 2)
    weight, bias = torch.full((4,), 0.5 * sign), torch.full((4,), -1.27)
    _, scale = backend.call(OP, x, weight, bias, 1, NORM_EPS, True, None, None, False)
    assert torch.allclose(scale, torch.full((2,), DIP / 127), rtol=1e-6)


def test_a_sample_of_one_value_is_the_bias(backend: Backend) -> None:
    x, bias = torch.full((2, 20, 3, 3), 3.0), torch.linspace(-1, 1, 20)
    q, scale = backend.call(OP, x, None, bias, 4, NORM_EPS, False, None, None, False)
    assert torch.equal(q, (bias * 127).round().to(torch.int8).view(1, 20, 1, 1).expand(2, 20, 3, 3))
    assert torch.allclose(scale, torch.full((2,), 1 / 127), rtol=1e-3)
    for per_token in (False, True):
        q, scale = backend.call(OP, x, None, None, 4, NORM_EPS, True, None, None, per_token)
        assert not q.any()
        assert ((scale > 0) & (scale < 1e-12)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("per_token", [False, True])
def test_what_is_not_finite_reaches_the_scales_of_its_own_sample_only(
    backend: Backend, value: float, per_token: bool
) -> None:
    x = torch.randn(3, 20, 4, 4)
    x[1, 19, 3, 3] = value
    _, scale = backend.call(OP, x, None, None, 4, NORM_EPS, True, None, None, per_token)
    assert scale[[0, 2]].isfinite().all()
    assert not scale[1].isfinite().any()


def test_groups_that_do_not_divide_the_channels_are_an_error(backend: Backend) -> None:
    with pytest.raises(RuntimeError, match="group"):
        backend.call(OP, torch.randn(1, 20, 2, 2), None, None, 3, NORM_EPS, True, None, None, False)


@FEW_EXAMPLES
@given(
    samples=st.integers(0, 3),
    groups=st.sampled_from([1, 3, 8]),
    group=st.integers(1, 9),
    size=st.tuples(st.integers(2, 9), st.integers(1, 9)),
    mode=st.sampled_from(MODES),
    per_token=st.booleans(),
)
def test_any_shape(
    backend: Backend, samples: int, groups: int, group: int, size: tuple[int, int], mode: str, per_token: bool
) -> None:
    channels = groups * group
    x, weight, bias = torch.randn(samples, channels, *size), torch.randn(channels), torch.randn(channels)
    if samples:
        check(backend, x, groups, weight, bias, mode, per_token=per_token)
    else:
        inv_scale = torch.ones(1) if "inv_scale" in mode else None
        q, _ = backend.call(OP, x, weight, bias, groups, NORM_EPS, True, inv_scale, None, per_token)
        assert q.shape == x.shape
