"""Adaptive norms: the time embedding's SiLU and quantization in one op, and the modulation inside the norm's op."""

from __future__ import annotations

from typing import Any

from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.integrations.diffusers.fused.eligibility import is_unwrapped, takes_int8


def modulation(norm: Any, emb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """linear(silu(emb)) in `parts` of (B, 1, C)."""
    linear = norm.linear
    if takes_int8(linear) and is_unwrapped(norm.silu, nn.SiLU):
        out = linear.linear(*ops.silu_quantize(emb, linear.input_inv_scale, linear.smoothing), emb.dtype)
    else:
        out = linear(norm.silu(emb))
    return out[:, None].chunk(parts, dim=-1)


def is_adaptive(norm: Any, kind: type[AdaLayerNormZero | AdaLayerNormZeroSingle | AdaLayerNormContinuous]) -> bool:
    """Whether a norm is diffusers' own of this kind over a plain LayerNorm, whose modulation is all that it adds."""
    return is_unwrapped(norm, kind) and is_unwrapped(norm.norm, nn.LayerNorm) and getattr(norm, "emb", None) is None
