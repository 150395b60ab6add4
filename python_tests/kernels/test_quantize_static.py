"""quantize_static is the definition bit for bit, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from python_tests.kernels.operands import DTYPES, FEW_EXAMPLES, Backend, rounded_int8, scrambled


def expected(x: Tensor, inv_scale: Tensor, channel_dim: int) -> Tensor:
    y = np.moveaxis(x.float().numpy(), channel_dim, -1) * inv_scale.numpy()
    return torch.from_numpy(np.moveaxis(rounded_int8(y), -1, channel_dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((2, 320, 3, 5), 1), ((1, 4, 17, 9), 1), ((17, 960), -1), ((2, 3, 7, 20), -1), ((2560,), -1)],
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_is_the_definition(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], channel_dim: int, per_channel: bool
) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    inv_scale = torch.rand(shape[channel_dim] if per_channel else 1) * 60 + 1
    wanted = expected(x, inv_scale, channel_dim)
    assert wanted.unique().numel() > 50
    assert torch.equal(backend.call("quantize_static", x, inv_scale, channel_dim), wanted)
    assert torch.equal(backend.call("quantize_static", scrambled(x), inv_scale, channel_dim), wanted)


def test_rounds_half_to_even_and_clamps(backend: Backend) -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.0, 1e30, -torch.inf, 0.0, -0.49999997])
    wanted = torch.tensor([0, 2, 2, 0, -2, 126, 127, -127, 127, -127, 0, 0], dtype=torch.int8)
    assert torch.equal(backend.call("quantize_static", x, torch.ones(1), -1), wanted)


def test_the_product_is_rounded_before_it_is_rounded_to_an_integer(backend: Backend) -> None:
    """Products that round onto a tie in float32: a fused multiply-add would see which side they came from."""
    inv_scale = (torch.rand(127) + 0.5).float()
    x = ((torch.arange(127) + 0.5).double() / inv_scale.double()).float()
    exact = x.double() * inv_scale.double()
    fused = torch.round(exact).to(torch.int8)
    wanted = expected(x, inv_scale, -1)
    assert (fused != wanted).sum() > 5
    assert torch.equal(backend.call("quantize_static", x, inv_scale, -1), wanted)


@FEW_EXAMPLES
@given(
    shape=st.lists(st.integers(0, 9), min_size=4, max_size=4), channels=st.sampled_from([1, 3, 70]), last=st.booleans()
)
def test_any_shape(backend: Backend, shape: list[int], channels: int, last: bool) -> None:
    channel_dim = -1 if last else 1
    shape[channel_dim] = channels
    x, inv_scale = torch.randn(shape), torch.rand(channels) * 40
    assert torch.equal(backend.call("quantize_static", x, inv_scale, channel_dim), expected(x, inv_scale, channel_dim))
