"""rotate_quantize_per_sample is the definition bit for bit, on every backend: integers and scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from python_tests.kernels.operands import DTYPES, Backend, dynamically_quantized, scrambled
from python_tests.kernels.rotation import rotated


def check(backend: Backend, x: Tensor, inv_smooth: Tensor | None) -> None:
    pixels = x.float().permute(0, 2, 3, 1).contiguous().numpy()
    y = rotated(pixels * (np.float32(1) if inv_smooth is None else inv_smooth.numpy())).reshape(pixels.shape)
    wanted_q, wanted_scale = dynamically_quantized(np.ascontiguousarray(y.transpose(0, 3, 1, 2)), (1, 2, 3))
    q, scale = backend.call("rotate_quantize_per_sample", x, inv_smooth)
    assert torch.equal(q, wanted_q)
    assert torch.equal(scale, wanted_scale)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 96, 4, 5), torch.float32), *(((2, 4, 17, 9), dtype) for dtype in DTYPES), ((1, 320, 3, 1), torch.bfloat16)],
)
def test_is_the_definition(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * torch.logspace(-2, 2, shape[0])[:, None, None, None]).to(dtype)
    check(backend, x, torch.exp2(torch.randint(-3, 4, shape[1:2]).float()))
    check(backend, x.contiguous(memory_format=torch.channels_last), None)
    check(backend, scrambled(x), None)


def test_an_empty_batch_and_a_picture_of_zeros(backend: Backend) -> None:
    assert backend.call("rotate_quantize_per_sample", torch.ones(0, 4, 3, 3), None)[1].shape == (0,)
    x = torch.randn(2, 4, 3, 3)
    x[0] = 0
    q, scale = backend.call("rotate_quantize_per_sample", x, None)
    assert not q[0].any()
    assert 0 < scale[0] < 1e-12
