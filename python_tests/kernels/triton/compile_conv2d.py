"""Calls of the convolutions at shapes from real UNets, on tensors without memory, for compile_triton.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.triton.tile_tables import Tile
from ldmq_kernels.numerics.formats.float8 import FLOAT8

F16, F32, I8, U8 = torch.float16, torch.float32, torch.int8, torch.uint8


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def geometry(stride: int = 1, upsample: int = 1, padding: tuple[int, ...] = (1, 1, 1, 1)) -> tuple:
    """A 3x3 kernel's."""
    return (3, 3), (stride, stride), padding, (1, 1), 1, upsample


def conv2d_w8a8(channels: int, size: int, out_channels: int, stride: int = 1, upsample: int = 1) -> tuple:
    """Per-sample scales, bias, time embedding and residual."""
    out_size = (size * upsample - 1) // stride + 1
    weight = empty(I8, out_channels, 3, 3, channels), empty(F32, out_channels)
    floats = empty(F16, out_channels), empty(F16, 2, out_channels), empty(F16, 2, out_channels, out_size, out_size)
    x = empty(I8, 2, channels, size, size), empty(F32, 2)
    return *x, *weight, *floats, *geometry(stride, upsample), F16


def conv2d_fp8(channels: int, size: int, out_channels: int) -> tuple:
    """The same in FP8."""
    x, x_scale, weight, *rest = conv2d_w8a8(channels, size, out_channels)
    return x.to(FLOAT8), x_scale, weight.to(FLOAT8), *rest


def conv2d_w4a8(channels: int, size: int, out_channels: int) -> tuple:
    """Per-sample scales, bias, time embedding and residual."""
    taps = out_channels, 3, 3
    weight = empty(U8, *taps, channels // 2), empty(U8, *taps, -(-channels // 64)), empty(F32, out_channels)
    floats = empty(F16, out_channels), empty(F16, 2, out_channels), empty(F16, 2, out_channels, size, size)
    return empty(I8, 2, channels, size, size), empty(F32, 2), *weight, *floats, *geometry(), F16


def conv2d_w8a16(channels: int, size: int, out_channels: int, dtype: torch.dtype = F16) -> tuple:
    """With bias."""
    weight = empty(I8, out_channels, 3, 3, channels), empty(F32, out_channels)
    return empty(dtype, 2, channels, size, size), *weight, empty(dtype, out_channels), *geometry()


# op, case, arguments, and a tile where it is not the one that the op would choose
CALLS: list[tuple[str, str, tuple, Tile | None]] = [
    ("conv2d_w8a8", "main", conv2d_w8a8(320, 128, 320), None),
    ("conv2d_w8a8", "conv_in", conv2d_w8a8(4, 64, 320), None),
    ("conv2d_w8a8", "conv_out", conv2d_w8a8(320, 128, 4), None),
    ("conv2d_w8a8", "upsample", conv2d_w8a8(1280, 16, 1280, upsample=2), None),
    ("conv2d_w8a8", "8x8", conv2d_w8a8(1280, 8, 1280), None),
    ("conv2d_w8a8", "odd extent", conv2d_w8a8(640, 65, 640, stride=2), None),
    ("conv2d_w8a8", "stride 2", conv2d_w8a8(640, 64, 640, stride=2), None),
    ("conv2d_fp8", "main", conv2d_fp8(320, 128, 320), None),
    ("conv2d_fp8", "160 columns", conv2d_fp8(640, 64, 640), None),
    ("conv2d_fp8", "conv_in", conv2d_fp8(4, 64, 320), None),
    ("conv2d_w4a8", "main", conv2d_w4a8(320, 128, 320), None),
    ("conv2d_w8a16", "main", conv2d_w8a16(320, 128, 320), None),
    ("conv2d_w8a16", "float32", conv2d_w8a16(320, 128, 320, F32), None),
]


def of_tile(table: str, n: int, has_tma: bool) -> tuple:
    """A call of a table's op at least as large as a tile, with everything that its epilogue can have."""
    op, *kind = table.split()
    channels = 324 if kind and has_tma else 320
    if op == "conv2d_w8a16":
        return conv2d_w8a16(channels, 32, 4 * n, F32 if "float32" in kind else F16)
    return {"conv2d_w8a8": conv2d_w8a8, "conv2d_w4a8": conv2d_w4a8}[op](channels, 32, 4 * n)
