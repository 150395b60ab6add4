"""Calls of the quantizations and producers, at shapes from real UNets and VAE decoders, for compile_triton.py."""

from __future__ import annotations

import torch
from torch import Tensor

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SMOOTH = "smooth"
TOKEN = "token"


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def scales(mode: str, channels: int) -> tuple[Tensor | None, Tensor | None]:
    """The reciprocal of a static quantization, by channel, or the smoothing vector of a dynamic one."""
    factor = empty(F32, channels)
    return (factor, None) if mode == "static" else (None, factor)


def group_norm(mode: str, channels: int, size: int, dtype: torch.dtype = F16, samples: int = 2) -> tuple:
    """32 groups and SiLU; `mode` is static, sample or token."""
    affine = empty(dtype, channels), empty(dtype, channels)
    x = empty(dtype, samples, channels, size, size)
    return x, *affine, 32, 1e-5, True, *scales(mode, channels), mode == "token"


def layer_norm(mode: str, rows: int, channels: int) -> tuple:
    """With weight and bias; `mode` is static or token."""
    affine = empty(F16, channels), empty(F16, channels)
    return empty(F16, rows, channels), *affine, 1e-5, *scales(mode, channels)


CALLS: list[tuple[str, str, tuple]] = [
    ("quantize_static", "main", (empty(F16, 2, 320, 128, 128), empty(F32, 320), 1)),
    ("quantize_static", "small", (empty(F16, 2, 1280, 8, 8), empty(F32, 1), 1)),
    ("quantize_per_token", "main", (empty(F16, 8192, 10240), empty(F32, 10240))),
    ("quantize_per_token", "small", (empty(F16, 154, 768), None)),
    ("quantize_per_sample", "main", (empty(F16, 2, 320, 128, 128), empty(F32, 320))),
    ("silu_quantize", "static", (empty(F16, 2, 1280), *scales("static", 1280))),
    ("silu_quantize", "token", (empty(F16, 2, 1280), *scales("token", 1280))),
    ("geglu_quantize", "static", (empty(F16, 8192, 5120), *scales("static", 2560))),
    ("geglu_quantize", "token", (empty(F16, 2048, 10240), *scales("token", 5120))),
    ("layer_norm_quantize", "static", layer_norm("static", 8192, 640)),
    ("layer_norm_quantize", "token", layer_norm("token", 2048, 1280)),
    ("group_norm_silu_quantize", "static", group_norm("static", 320, 128)),
    ("group_norm_silu_quantize", "sample", group_norm("sample", 640, 64)),
    ("group_norm_silu_quantize", "token", group_norm("token", 2560, 32)),
    ("group_norm_silu_quantize", "slab", group_norm("static", 640, 32)),
    ("group_norm_silu_quantize", "slab dyn", group_norm("sample", 2560, 8)),
    ("group_norm_silu_quantize", "pixel", group_norm("sample", 320, 1)),
    ("group_norm_silu_quantize", "decoder", group_norm("static", 128, 1024, BF16, samples=1)),
]
