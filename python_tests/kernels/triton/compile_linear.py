"""Calls of the linears at shapes from real UNets, on tensors without memory, for compile_triton.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.triton.tile_tables import Tile
from ldmq_kernels.numerics.formats.float8 import FLOAT8

F16, F32, I8, U8 = torch.float16, torch.float32, torch.int8, torch.uint8


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def linear_w8a8(m: int, k: int, n: int) -> tuple:
    """Per-token scales, bias and residual."""
    floats = empty(F16, n), empty(F16, m, n)
    return empty(I8, m, k), empty(F32, m), empty(I8, n, k), empty(F32, n), *floats, F16


def linear_fp8(m: int, k: int, n: int) -> tuple:
    """The same in FP8."""
    x, x_scale, weight, *rest = linear_w8a8(m, k, n)
    return x.to(FLOAT8), x_scale, weight.to(FLOAT8), *rest


def gated(arguments: tuple, n: int) -> tuple:
    """The same with a gate for each of two samples."""
    return *arguments, empty(F16, 2, n)


def linear_geglu_w8a8(m: int, k: int, n: int, out: torch.dtype = I8) -> tuple:
    """Per-token scales and bias; a scale for each channel of a quantized output."""
    x, x_scale, weight, weight_scale, bias, *_ = linear_w8a8(m, k, n)
    return x, x_scale, weight, weight_scale, bias, None if out == F16 else empty(F32, n // 2), out


def linear_geglu_fp8(m: int, k: int, n: int, out: torch.dtype = FLOAT8) -> tuple:
    """The same in FP8."""
    x, x_scale, weight, *rest = linear_geglu_w8a8(m, k, n, out)
    return x.to(FLOAT8), x_scale, weight.to(FLOAT8), *rest


def linear_static_w8a8(m: int, k: int, n: int, smoothed: bool) -> tuple:
    """Bias and residual."""
    floats = empty(F16, n), empty(F16, m, n)
    quantization = empty(F32, k if smoothed else 1), empty(F32, 1)
    return empty(F16, m, k), *quantization, empty(I8, n, k), empty(F32, n), *floats


def linear_w4a8(m: int, k: int, n: int) -> tuple:
    """Per-token scales, bias and residual."""
    weight = empty(U8, n, k // 2), empty(U8, n, -(-k // 64)), empty(F32, n)
    return empty(I8, m, k), empty(F32, m), *weight, empty(F16, n), empty(F16, m, n), F16


def linear_w8a16(m: int, k: int, n: int, dtype: torch.dtype = F16) -> tuple:
    """With bias."""
    return empty(dtype, m, k), empty(I8, n, k), empty(F32, n), empty(dtype, n)


def linear_w4a16(m: int, k: int, n: int, dtype: torch.dtype = F16) -> tuple:
    """With bias."""
    weight = empty(U8, n, k // 2), empty(F32, n, -(-k // 64))
    return empty(dtype, m, k), *weight, empty(dtype, n)


# op, case, arguments, and a tile where it is not the one that the op would choose
CALLS: list[tuple[str, str, tuple, Tile | None]] = [
    ("linear_w8a8", "main", linear_w8a8(8192, 640, 5120), None),
    ("linear_w8a8", "160 columns", linear_w8a8(2048, 1280, 1280), None),
    ("linear_w8a8", "256 columns", linear_w8a8(8192, 640, 5120), Tile(128, 256, 64, 8, 3)),
    ("linear_w8a8", "persistent", linear_w8a8(8192, 640, 5120), Tile(128, 128, 64, 8, 3, persistent=True)),
    ("linear_w8a8", "split", linear_w8a8(128, 5120, 1280), None),
    ("linear_w8a8", "64 rows", linear_w8a8(64, 1280, 1280), None),
    ("linear_w8a8", "2 rows", linear_w8a8(2, 320, 1280), None),
    ("linear_w8a8", "unaligned", linear_w8a8(2048, 1284, 1280), None),
    ("linear_w8a8", "gated", gated(linear_w8a8(8192, 12288, 3072), 3072), None),
    ("linear_w8a8", "gated split", gated(linear_w8a8(128, 5120, 1280), 1280), None),
    ("linear_static_w8a8", "gated", gated(linear_static_w8a8(8192, 320, 320, smoothed=False), 320), None),
    ("linear_fp8", "main", linear_fp8(8192, 640, 5120), None),
    ("linear_fp8", "160 columns", linear_fp8(2048, 1280, 1280), None),
    ("linear_fp8", "unaligned", linear_fp8(2048, 1284, 1280), None),
    ("linear_fp8", "split", linear_fp8(128, 5120, 1280), None),
    ("linear_geglu_w8a8", "main", linear_geglu_w8a8(2048, 1280, 10240), None),
    ("linear_geglu_w8a8", "16 bit", linear_geglu_w8a8(8192, 640, 5120, F16), None),
    ("linear_geglu_w8a8", "to fp8", linear_geglu_w8a8(2048, 1280, 10240, FLOAT8), None),
    ("linear_geglu_w8a8", "unaligned", linear_geglu_w8a8(2048, 1284, 10240), None),
    ("linear_geglu_fp8", "main", linear_geglu_fp8(2048, 1280, 10240), None),
    ("linear_geglu_fp8", "16 bit", linear_geglu_fp8(2048, 1280, 10240, F16), None),
    ("linear_w4a8", "gated", gated(linear_w4a8(8192, 1536, 1536), 1536), None),
    ("linear_static_w8a8", "main", linear_static_w8a8(8192, 320, 320, smoothed=False), None),
    ("linear_static_w8a8", "smoothed", linear_static_w8a8(2048, 640, 640, smoothed=True), None),
    ("linear_w4a8", "main", linear_w4a8(8192, 640, 5120), None),
    ("linear_w8a16", "main", linear_w8a16(8192, 640, 5120), None),
    ("linear_w8a16", "float32", linear_w8a16(8192, 640, 5120, F32), None),
    ("linear_w4a16", "main", linear_w4a16(8192, 640, 5120, torch.bfloat16), None),
    ("linear_w4a16", "float32", linear_w4a16(8192, 640, 5120, F32), None),
]


def of_tile(table: str, m: int, n: int) -> tuple:
    """A call of a table's op at least as large as a tile, with everything that its epilogue can have."""
    op, *kind = table.split()
    k = 1284 if "unaligned" in kind else 1280
    dtype = F32 if "float32" in kind else F16
    if op == "linear_static_w8a8":
        return linear_static_w8a8(4 * m, k, 4 * n, smoothed=True)
    if op == "linear_geglu_w8a8":
        return linear_geglu_w8a8(4 * m, k, 4 * n)
    if op.endswith("a16"):
        return {"linear_w8a16": linear_w8a16, "linear_w4a16": linear_w4a16}[op](4 * m, k, 4 * n, dtype)
    return {"linear_w8a8": linear_w8a8, "linear_w4a8": linear_w4a8}[op](4 * m, k, 4 * n)
