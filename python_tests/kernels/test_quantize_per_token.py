"""quantize_per_token is the definition bit for bit, on every backend: integers and scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from python_tests.kernels.operands import DTYPES, FEW_EXAMPLES, Backend, dynamically_quantized, scrambled


def check(backend: Backend, x: Tensor, inv_smooth: Tensor | None) -> None:
    y = x.float().numpy() * (np.float32(1) if inv_smooth is None else inv_smooth.numpy())
    wanted_q, wanted_scale = dynamically_quantized(y, (-1,))
    q, scale = backend.call("quantize_per_token", x, inv_smooth)
    assert torch.equal(q, wanted_q)
    assert torch.equal(scale, wanted_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17, 320), (3, 21, 20), (2, 2560), (63, 4), (5, 1), (960,)])
@pytest.mark.parametrize("smoothed", [False, True])
def test_is_the_definition(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], smoothed: bool) -> None:
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    inv_smooth = torch.exp2(torch.randint(-3, 4, shape[-1:]).float()) if smoothed else None
    check(backend, x, inv_smooth)
    check(backend, scrambled(x), inv_smooth)


def test_a_row_of_zeros_has_a_positive_scale(backend: Backend) -> None:
    x = torch.randn(3, 20)
    x[1] = 0
    q, scale = backend.call("quantize_per_token", x, None)
    assert not q[1].any()
    assert 0 < scale[1] < 1e-12


def test_rows_at_the_ends_of_float16(backend: Backend) -> None:
    x = torch.tensor([[65504.0, -65504.0, 1.0], [6e-8, -6e-8, 0.0], [65504.0, 6e-8, -257.9]]).half()
    check(backend, x, None)


def test_a_nan_reaches_its_own_scale_only(backend: Backend) -> None:
    x = torch.randn(4, 20)
    x[2, 7] = torch.nan
    _, scale = backend.call("quantize_per_token", x, None)
    assert scale.isnan().tolist() == [False, False, True, False]


@FEW_EXAMPLES
@given(batch=st.lists(st.integers(0, 7), max_size=3), channels=st.integers(1, 300))
def test_any_shape(backend: Backend, batch: list[int], channels: int) -> None:
    check(backend, torch.randn(*batch, channels), torch.rand(channels) + 0.1)
