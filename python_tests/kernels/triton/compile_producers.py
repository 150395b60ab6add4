"""Calls of the quantizations and producers, at shapes from real UNets and a VAE decoder, for compile_triton.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.triton.tile_tables import Tile
from ldmq_kernels.numerics.formats.float8 import FLOAT8

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def factors(mode: str, channels: int) -> tuple[Tensor | None, Tensor | None]:
    """The inv_scale of a static quantization, by channel, or the inv_smooth of a measured scale."""
    factor = empty(F32, channels)
    return (factor, None) if mode == "static" else (None, factor)


def group_norm(mode: str, channels: int, size: int, dtype: torch.dtype = F16, samples: int = 2) -> tuple:
    """32 groups and SiLU; `mode` is static, sample or token."""
    affine = empty(dtype, channels), empty(dtype, channels)
    x = empty(dtype, samples, channels, size, size)
    return x, *affine, 32, 1e-5, True, *factors(mode, channels), mode == "token"


def layer_norm(mode: str, rows: int, channels: int) -> tuple:
    """With weight and bias; `mode` is static or token."""
    affine = empty(F16, channels), empty(F16, channels)
    return empty(F16, rows, channels), *affine, 1e-5, *factors(mode, channels)


def modulated(mode: str, rows: int, channels: int) -> tuple:
    """Without weight and bias, and with the scale and shift of two samples in float32."""
    x, modulation = empty(F16, rows, channels), empty(F32, 2, channels)
    return x, None, None, 1e-6, *factors(mode, channels), modulation, modulation


# op, case, arguments, and no tile, since a producer has no table
CALLS: list[tuple[str, str, tuple, Tile | None]] = [
    ("quantize_static", "main", (empty(F16, 2, 320, 128, 128), empty(F32, 320), 1), None),
    ("quantize_static", "small", (empty(F16, 2, 1280, 8, 8), empty(F32, 1), 1), None),
    ("quantize_per_token", "main", (empty(F16, 8192, 10240), empty(F32, 10240)), None),
    ("quantize_per_sample", "main", (empty(F16, 2, 320, 128, 128), empty(F32, 320)), None),
    ("quantize_per_token", "fp8", (empty(F16, 8192, 640), empty(F32, 640), FLOAT8), None),
    ("rotate_quantize_per_token", "main", (empty(F16, 8192, 2560), None), None),
    ("rotate_quantize_per_sample", "main", (empty(F16, 2, 320, 128, 128), None), None),
    ("silu_quantize", "static", (empty(F16, 2, 1280), *factors("static", 1280)), None),
    ("silu_quantize", "token", (empty(F16, 2, 1280), *factors("token", 1280)), None),
    ("geglu_quantize", "static", (empty(F16, 8192, 5120), *factors("static", 2560)), None),
    ("geglu_quantize", "token", (empty(F16, 2048, 10240), *factors("token", 5120)), None),
    ("geglu_quantize", "widest", (empty(F16, 64, 32768), *factors("token", 16384)), None),
    ("gelu_quantize", "static", (empty(F16, 8192, 12288), True, *factors("static", 12288)), None),
    ("gelu_quantize", "token", (empty(F16, 8192, 12288), True, *factors("token", 12288)), None),
    ("gelu_quantize", "error function", (empty(BF16, 2048, 5120), False, *factors("token", 5120)), None),
    ("layer_norm_quantize", "modulated", modulated("token", 8192, 3072), None),
    ("layer_norm_quantize", "modulated static", modulated("static", 8192, 1536), None),
    ("layer_norm_quantize", "modulated widest", modulated("token", 64, 16384), None),
    ("layer_norm_quantize", "static", layer_norm("static", 8192, 640), None),
    ("layer_norm_quantize", "token", layer_norm("token", 2048, 1280), None),
    ("layer_norm_quantize", "widest", layer_norm("token", 64, 16384), None),
    ("group_norm_silu_quantize", "static", group_norm("static", 320, 128), None),
    ("group_norm_silu_quantize", "sample", group_norm("sample", 640, 64), None),
    ("group_norm_silu_quantize", "token", group_norm("token", 2560, 32), None),
    ("group_norm_silu_quantize", "small groups", group_norm("static", 640, 32), None),
    ("group_norm_silu_quantize", "small sample", group_norm("sample", 2560, 8), None),
    ("group_norm_silu_quantize", "one pixel", group_norm("sample", 320, 1), None),
    ("group_norm_silu_quantize", "decoder", group_norm("static", 128, 1024, BF16, samples=1), None),
]
