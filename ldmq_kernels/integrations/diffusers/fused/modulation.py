"""Adaptive norms: the time embedding's SiLU and quantization in one op, and the modulation inside the norm's op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.integrations.diffusers.fused import feed_forward
from ldmq_kernels.integrations.diffusers.fused.eligibility import is_unwrapped, quantized_layer_norm, takes_quantized
from ldmq_kernels.integrations.diffusers.fused.projections import SharesProjections


def modulation(norm: Any, emb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """linear(silu(emb)) in `parts` of (B, 1, C)."""
    linear = norm.linear
    if takes_quantized(linear) and is_unwrapped(norm.silu, nn.SiLU):
        rounding = (linear.input_inv_scale, linear.smoothing, *linear.scheme.activations.op_dtype)
        out = linear.linear(*ops.silu_quantize(emb, *rounding), emb.dtype)
    else:
        out = linear(norm.silu(emb))
    return out[:, None].chunk(parts, dim=-1)


def is_adaptive(norm: Any, kind: type[nn.Module]) -> bool:
    """Whether a norm is diffusers' own of this kind over a plain LayerNorm, whose modulation is all that it adds."""
    return is_unwrapped(norm, kind) and is_unwrapped(norm.norm, nn.LayerNorm) and getattr(norm, "emb", None) is None


def projected(
    block: SharesProjections, name: str, norm: Any, x: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    """What a group of the block's projections makes of norm(x) * (1 + scale) + shift."""
    return block._shared[name](
        block.projections()[name],
        x.dtype,
        lambda layer: quantized_layer_norm(norm, x, layer, scale, shift),
        lambda: norm(x) * (1 + scale) + shift,
    )


def fed(ff: Any, norm: Any, x: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """x + gate * ff(norm(x) * (1 + scale) + shift); `terms` are shift, scale and gate."""
    shift, scale, gate = terms
    return feed_forward.run(
        ff,
        x,
        lambda layer: quantized_layer_norm(norm, x, layer, scale, shift),
        lambda: norm(x) * (1 + scale) + shift,
        x,
        gate,
    )
