"""Whether oneDNN's int8 products are exact on this processor.

VPMADDUBSW, which oneDNN uses where there is no VNNI, adds two products in 16 bits: 255 * 127 * 2
saturates at 32767, with no error. Inputs of the largest values show it in any shape.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import onednn

LINEARS = ((1, 4, 20), (17, 320, 32), (64, 64, 64))  # (M, K, N)
CONVOLUTIONS = ((4, 32, 1, 1), (64, 64, 1, 1), (64, 4, 2, 1), (32, 32, 1, 32))  # (C, K, stride, groups), 3x3


def _filled(shape: tuple[int, ...], sign: int) -> Tensor:
    return torch.full(shape, 127 * sign, dtype=torch.int8, device="cpu")


def _ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float32, device="cpu")  # whatever torch's defaults are when an op is first used


def _linear_is_exact(m: int, k: int, n: int, sign: int) -> bool:
    packed = onednn.prepack_linear(_filled((n, k), 1))
    out = onednn.linear(_filled((m, k), sign), 1.0, packed, _ones(n), None, torch.float32)
    return bool((out == 127 * 127 * k * sign).all())


def _conv2d_is_exact(c: int, k: int, stride: int, groups: int, sign: int) -> bool:
    x_q = _filled((1, c, 8, 8), sign).contiguous(memory_format=torch.channels_last)
    weight = _filled((k, c // groups, 3, 3), 1)
    geometry = ((stride, stride), (1, 1), (1, 1), groups)
    packed = onednn.prepack_conv2d(weight, *geometry, x_q.shape)
    out = onednn.conv2d(x_q, 1.0, packed, _ones(k), None, *geometry, torch.float32)
    exact = torch.nn.functional.conv2d(x_q.double(), weight.double(), None, *geometry)
    return bool((out == exact).all())


@functools.cache
def is_exact() -> bool:
    """Run the worst cases once in this process; False also where this torch lacks the ops."""
    if not onednn.is_built_in():
        return False
    linears = all(_linear_is_exact(*case, sign) for case in LINEARS for sign in (1, -1))
    return linears and all(_conv2d_is_exact(*case, sign) for case in CONVOLUTIONS for sign in (1, -1))
