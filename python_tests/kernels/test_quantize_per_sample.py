"""quantize_per_sample is the definition bit for bit, on every backend: integers and scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from python_tests.kernels.operands import DTYPES, FEW_EXAMPLES, Backend, dynamically_quantized, scrambled


def check(backend: Backend, x: Tensor, inv_smooth: Tensor | None) -> None:
    factor = np.ones(1, np.float32) if inv_smooth is None else inv_smooth.numpy()
    wanted_q, wanted_scale = dynamically_quantized(x.float().numpy() * factor[:, None, None], (1, 2, 3))
    q, scale = backend.call("quantize_per_sample", x, inv_smooth)
    assert torch.equal(q, wanted_q)
    assert torch.equal(scale, wanted_scale)


@pytest.mark.parametrize(  # a dtype is only loaded: one a shape, and all on two
    ("shape", "dtype"),
    [
        *(((3, 320, 4, 5), dtype) for dtype in DTYPES),
        *(((2, 4, 17, 9), dtype) for dtype in DTYPES),
        ((1, 2560, 2, 1), torch.bfloat16),
        ((2, 20, 21, 3), torch.float16),
    ],
)
@pytest.mark.parametrize("smoothed", [False, True])
def test_is_the_definition(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], smoothed: bool) -> None:
    x = (torch.randn(shape) * torch.logspace(-2, 2, shape[0])[:, None, None, None]).to(dtype)
    inv_smooth = torch.exp2(torch.randint(-3, 4, shape[1:2]).float()) if smoothed else None
    check(backend, x, inv_smooth)
    check(backend, x.contiguous(memory_format=torch.channels_last), inv_smooth)
    check(backend, scrambled(x), inv_smooth)


@pytest.mark.parametrize("position", [0, 4 * 257 * 257 - 1])
def test_the_largest_value_is_found_anywhere_in_a_large_picture(backend: Backend, position: int) -> None:
    x = torch.rand(1, 257, 257, 4)
    x.view(-1)[position] = -1000
    q, scale = backend.call("quantize_per_sample", x.permute(0, 3, 1, 2), None)
    assert torch.equal(scale, torch.tensor([1000.0]) / 127)
    assert q.permute(0, 2, 3, 1).flatten()[position] == -127
    assert (q != 0).sum() == 1


def test_a_nan_reaches_its_own_scale_only(backend: Backend) -> None:
    x = torch.randn(3, 20, 4, 4)
    x[1, 19, 3, 3] = torch.nan
    _, scale = backend.call("quantize_per_sample", x, None)
    assert scale.isnan().tolist() == [False, True, False]


def test_a_picture_of_zeros_has_a_positive_scale(backend: Backend) -> None:
    x = torch.randn(2, 4, 3, 3)
    x[0] = 0
    q, scale = backend.call("quantize_per_sample", x, None)
    assert not q[0].any()
    assert 0 < scale[0] < 1e-12


@FEW_EXAMPLES
@given(samples=st.integers(0, 3), channels=st.sampled_from([1, 3, 70]), size=st.tuples(*[st.integers(1, 9)] * 2))
def test_any_shape(backend: Backend, samples: int, channels: int, size: tuple[int, int]) -> None:
    check(backend, torch.randn(samples, channels, *size), torch.rand(channels) + 0.1)
