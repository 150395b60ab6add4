"""layer_norm_quantize is LayerNorm and quantization in float32, but for one step near a tie, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from python_tests.kernels.operands import DTYPES, FEW_EXAMPLES, Backend, scrambled
from python_tests.kernels.producers import EPS, MODES, TIES, assert_quantized, factors, rounding

NORM_EPS = 1e-5


def check(
    backend: Backend,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mode: str,
    ties: float = TIES,
    modulation: tuple[Tensor | None, Tensor | None] | None = None,
) -> None:
    exact = x.double()
    mean, variance = exact.mean(-1, keepdim=True), exact.var(-1, unbiased=False, keepdim=True)
    multiplier = (variance + NORM_EPS).rsqrt() * (1 if weight is None else weight.double())
    shift = torch.zeros(()) if bias is None else bias.double()
    if modulation is not None:
        rows = [None if m is None else m.double().reshape(-1, m.shape[-1]) for m in modulation]
        scale, added = (
            None if r is None else r.repeat_interleave(x[..., 0].numel() // len(r), 0).reshape(x.shape) for r in rows
        )
        multiplier = multiplier * (1 if scale is None else 1 + scale)
        shift = shift * (1 if scale is None else 1 + scale) + (0 if added is None else added)
    y = (exact - mean) * multiplier + shift
    # the mean is itself a float32, so x - mean is off by its rounding
    error = 8 * EPS * ((exact.abs() + mean.abs()) * multiplier.abs() + y.abs() + shift.abs())
    error = error + rounding(backend, x.dtype, y, shift)
    given_factors = factors(mode, y)
    results = backend.call("layer_norm_quantize", x, weight, bias, NORM_EPS, *given_factors, *(modulation or ()))
    assert_quantized(backend, *results, y, error, *given_factors, ties=ties)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17, 320), (3, 5, 20), (2, 2560), (21, 4), (960,)])
@pytest.mark.parametrize("mode", MODES)
def test_is_the_definition(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], mode: str) -> None:
    x = (torch.randn(shape) * 2 + 0.5).to(dtype)
    weight, bias = (torch.randn(shape[-1:]) + 1).to(dtype), torch.randn(shape[-1:]).to(dtype)
    check(backend, x, weight, bias, mode)
    check(backend, scrambled(x), weight, None, mode)
    check(backend, x, None, None, mode)


def test_parameters_may_be_wider_than_the_activations(backend: Backend) -> None:
    x, weight, bias = torch.randn(3, 320).half(), torch.rand(320) + 0.5, torch.randn(320)
    check(backend, x, weight, bias if backend.name != "cpu" else bias.half(), "measured")


@pytest.mark.parametrize(
    ("runs", "dtype"),
    [((3, 1), torch.float16), ((1, 1), torch.float32), ((3, 5), torch.bfloat16)],
    ids=["of samples", "one", "of tokens"],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_modulation_has_a_row_for_each_run_of_tokens(
    backend: Backend, dtype: torch.dtype, runs: tuple[int, int], mode: str
) -> None:
    x = (torch.randn(3, 5, 320) * 2 + 0.5).to(dtype)
    scale, shift = (torch.randn(*runs, 320).to(dtype) for _ in range(2))
    check(backend, x, None, None, mode, modulation=(scale, shift))
    check(backend, x, torch.randn(320), torch.randn(320), mode, modulation=(scale.float(), None))
    check(backend, scrambled(x), None, None, mode, modulation=(None, scrambled(shift)))


def test_a_modulation_whose_runs_do_not_divide_the_rows_is_refused(backend: Backend) -> None:
    for modulation in (torch.randn(2, 20), torch.randn(3, 19)):
        with pytest.raises(RuntimeError):
            backend.call("layer_norm_quantize", torch.randn(3, 20), None, None, NORM_EPS, None, None, modulation, None)


@pytest.mark.parametrize("runs", [0, 1])
def test_an_empty_batch_has_a_modulation_of_no_rows_or_of_one(backend: Backend, runs: int) -> None:
    x, modulation = torch.randn(0, 5, 20), torch.randn(runs, 1, 20)
    q, scale = backend.call("layer_norm_quantize", x, None, None, NORM_EPS, None, None, modulation, modulation)
    assert (q.shape, q.dtype, scale.shape) == (x.shape, torch.int8, (0, 5))


@pytest.mark.parametrize("channels", [20, 960])
def test_a_small_variance_about_a_large_mean_is_found(backend: Backend, channels: int) -> None:
    """The mean of the squares less the square of the mean would have no digit of it."""
    check(backend, torch.randn(5, channels) + 512, None, None, "measured", ties=0.2)


def test_a_row_of_one_value_is_the_bias(backend: Backend) -> None:
    x, bias = torch.full((2, 20), 3.0), torch.linspace(-1, 1, 20)
    q, scale = backend.call("layer_norm_quantize", x, None, bias, NORM_EPS, None, None)
    assert torch.equal(q, (bias * 127).round().to(torch.int8).expand(2, 20))
    assert torch.allclose(scale, torch.full((2,), 1 / 127), rtol=1e-3)
    q, scale = backend.call("layer_norm_quantize", x, None, None, NORM_EPS, None, None)
    assert not q.any()
    assert ((scale > 0) & (scale < 1e-12)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_its_own_scale_only(backend: Backend, value: float) -> None:
    x = torch.randn(4, 20)
    x[2, 7] = value
    _, scale = backend.call("layer_norm_quantize", x, None, None, NORM_EPS, None, None)
    assert scale.isfinite().tolist() == [True, True, False, True]


@FEW_EXAMPLES
@given(batch=st.lists(st.integers(0, 5), max_size=3), channels=st.integers(2, 200), mode=st.sampled_from(MODES))
def test_any_shape(backend: Backend, batch: list[int], channels: int, mode: str) -> None:
    x = torch.randn(*batch, channels)
    if x.numel():
        check(backend, x, torch.rand(channels) + 0.5, torch.randn(channels), mode)
    else:
        inv_scale = torch.ones(1) if "inv_scale" in mode else None
        q, _ = backend.call("layer_norm_quantize", x, None, None, NORM_EPS, inv_scale, None)
        assert q.shape == x.shape
