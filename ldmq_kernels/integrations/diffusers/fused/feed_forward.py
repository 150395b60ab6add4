"""Feed-forward: projection, [GELU + quantize] or [GEGLU + quantize], projection with gate and residual.

GEGLU is in the epilogue of its projection, and so is the quantization by a calibrated scale, where a backend has that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward
from torch import Tensor

from ldmq_kernels import ops
from ldmq_kernels.integrations.diffusers.fused.eligibility import (
    is_inactive,
    is_unhooked,
    is_unwrapped,
    takes_quantized,
    wants_gradients,
)
from ldmq_kernels.nn import QuantLinear


class FusedFeedForward(FeedForward):
    """FeedForward whose activation function and the quantization after it are one op."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Take and return what the forward of FeedForward does."""
        if args or kwargs or not is_plain(self) or wants_gradients(self, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        if not _gates_in_epilogue(self):
            return feed(self, self.net[0].proj(hidden_states))
        return run(self, hidden_states, lambda layer: layer.quantize(hidden_states), lambda: hidden_states)


def is_plain(ff: Any) -> bool:
    """Whether a feed-forward computes what `feed` does and nothing more: whoever calls it with a gate asks first."""
    if type(ff) not in (FeedForward, FusedFeedForward):
        return False
    first, *rest = ff.net
    return (
        is_unhooked(ff)
        and (is_unwrapped(first, GEGLU) or (is_unwrapped(first, GELU) and first.approximate in ("none", "tanh")))
        and len(rest) > 1
        and all(is_inactive(module) for module in (rest[0], *rest[2:]))
    )


def run(
    ff: Any,
    x: Tensor,
    quantized: Callable[[Any], tuple[Tensor, Tensor | None]],
    plain: Callable[[], Tensor],
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """ff * gate + residual, in x's dtype.

    Args:
        ff: for which `is_plain` holds.
        x: whose dtype the feed-forward computes in.
        quantized: the first layer to its quantized input and the scales of that.
        plain: makes the input floating.
        residual: of the output's shape.
        gate: that broadcasts to the output.
    """
    layer = ff.net[0].proj
    if not takes_quantized(layer):
        return feed(ff, layer(plain()), residual, gate)
    x_q, scale = quantized(layer)
    if not _gates_in_epilogue(ff):
        return feed(ff, layer.linear(x_q, scale, x.dtype), residual, gate)
    out = ff.net[2]
    inv_scale = out.input_inv_scale if takes_quantized(out) else None
    if inv_scale is None:  # measured for each token, which no tile sees whole
        return gated(out, layer.geglu(x_q, scale, x.dtype), residual, gate)
    hidden = layer.geglu(x_q, scale, out.scheme.activations.dtype, inv_scale)
    return out.linear(hidden, None, x.dtype, residual, gate=gate)


def _gates_in_epilogue(ff: Any) -> bool:
    """Whether the first product's epilogue can have GEGLU."""
    layer = ff.net[0].proj
    return isinstance(ff.net[0], GEGLU) and takes_quantized(layer) and layer.geglu_op is not None


def feed(ff: Any, hidden: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """What comes after a first projection without its activation: out(activation(hidden)) * gate + residual."""
    first, out = ff.net[0], ff.net[2]
    if takes_quantized(out):
        rounding = (out.input_inv_scale, out.smoothing, *out.scheme.activations.op_dtype)
        if isinstance(first, GEGLU):
            x_q, scale = ops.geglu_quantize(hidden, *rounding)
        else:
            x_q, scale = ops.gelu_quantize(hidden, first.approximate == "tanh", *rounding)
        return out.linear(x_q, scale, hidden.dtype, residual, gate=gate)
    if isinstance(first, GEGLU):
        value, gates = hidden.chunk(2, dim=-1)
        hidden = value * first.gelu(gates)
    else:
        hidden = first.gelu(hidden)
    return gated(out, hidden, residual, gate)


def gated(layer: Any, x: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
    """layer(x) * gate + residual in x's dtype; in the epilogue where the layer is quantized and nothing is on it."""
    if is_unwrapped(layer, QuantLinear):
        return layer.project(x, residual, gate)
    out = layer(x)
    if gate is not None:
        out = out * gate
    return (out if residual is None else out + residual).to(x.dtype)
