"""rotate_quantize_per_token is the definition bit for bit, on every backend: integers and scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from python_tests.kernels.operands import DTYPES, Backend, dynamically_quantized, scrambled
from python_tests.kernels.rotation import rotated


def check(backend: Backend, x: Tensor, inv_smooth: Tensor | None) -> None:
    y = x.float().numpy() * (np.float32(1) if inv_smooth is None else inv_smooth.numpy())
    wanted_q, wanted_scale = dynamically_quantized(rotated(y).reshape(y.shape), (-1,))
    q, scale = backend.call("rotate_quantize_per_token", x, inv_smooth)
    assert torch.equal(q, wanted_q)
    assert torch.equal(scale, wanted_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 320), (2, 3, 20), (7, 4), (3, 1), (96,)])
def test_is_the_definition(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    check(backend, x, torch.exp2(torch.randint(-3, 4, shape[-1:]).float()))
    check(backend, scrambled(x), None)


def test_an_empty_input_and_a_row_of_zeros(backend: Backend) -> None:
    assert backend.call("rotate_quantize_per_token", torch.ones(0, 32), None)[0].shape == (0, 32)
    q, scale = backend.call("rotate_quantize_per_token", torch.zeros(1, 32), None)
    assert not q.any()
    assert 0 < scale[0] < 1e-12


def test_one_large_channel_is_spread_over_its_block(backend: Backend) -> None:
    q, scale = backend.call("rotate_quantize_per_token", torch.eye(64)[5:6] * 254, None)
    assert q[0, :32].abs().eq(127).all()
    assert not q[0, 32:].any()
    assert scale.tolist() == [2.0]
